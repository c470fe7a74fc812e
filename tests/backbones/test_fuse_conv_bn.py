import copy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from torch import nn

from acmix_mm.backbones import (
    SAN,
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
    DWNet,
    XVolutionResNet,
)

DWNET = {'embed_dims': 32, 'depths': (1, 1, 1, 1)}
BACKBONES = {
    'ACmixResNet': lambda: ACmixResNet(26, base_channels=16),
    'ACmixSAN': lambda: ACmixSAN(10, base_channels=32),
    'PVT': lambda: ACmixPyramidVisionTransformer(embed_dims=16, num_layers=[1, 1, 1, 1]),
    'SAN': lambda: SAN(10, base_channels=32),
    'Swin': lambda: ACmixSwinTransformer(embed_dims=24, depths=(1, 1, 1, 1)),
    'XVolutionResNet': lambda: XVolutionResNet(18, base_channels=16),
    'DWNet': lambda: DWNet(DWNET),
    'DWNet homogeneous': lambda: DWNet(DWNET, 'homogeneous'),
    'DWNet inhomogeneous': lambda: DWNet(DWNET, 'inhomogeneous'),
}


@pytest.mark.parametrize('name', BACKBONES)
def test_outputs_stay(name):
    """mmcv folds each batch norm into the convolution registered before it: --fuse-conv-bn."""
    model = BACKBONES[name]().double()
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    fused = fuse_conv_bn(copy.deepcopy(model))
    with torch.no_grad():
        for ours, expected in zip(fused(x), model(x), strict=True):
            assert (ours - expected).norm() <= 1e-5 * expected.norm()
