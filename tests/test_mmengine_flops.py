"""mmengine's counter, which the get_flops.py of mmdet and mmseg call, against PyTorch's."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.backbones import (
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
    DWNet,
    XVolutionResNet,
)
from acmix_mm.layers import ACmix
from acmix_mm.ops import available_backends

BACKENDS = [name for name in available_backends() if name != 'triton']
# What PyTorch's counter does not count.
NOT_PRODUCTS = ('batch_norm', 'layer_norm', 'adaptive_avg_pool2d', 'upsample_bilinear2d')

FAMILIES = {
    'ACmixResNet': lambda b: ACmixResNet(26, backend=b),
    'ACmixSwin': lambda b: ACmixSwinTransformer(embed_dims=48, depths=(2, 1, 1, 1), backend=b),
    'ACmixPVT': lambda b: ACmixPyramidVisionTransformer(num_layers=[1, 1, 1, 1], backend=b),
    'ACmixSAN': lambda b: ACmixSAN(10, backend=b),
    'XVolutionResNet': lambda b: XVolutionResNet(18, backend=b),
    'XVolutionResNet, local': lambda b: XVolutionResNet(18, attention='local', backend=b),
    'DWNet': lambda b: DWNet({'embed_dims': 32, 'depths': (1, 1, 1, 1)}, 'inhomogeneous'),
}


@pytest.mark.parametrize('backend', BACKENDS)
def test_operator(backend):
    layer = ACmix(8, 16, num_heads=2, stride=2, backend=backend).eval()
    layer.switch_to_deploy()
    # Projections; logits and sums of 49; the folded convolution of 6 maps.
    flops = 3 * 16 * 8 * 12 * 10 + (2 * 49 + 9 * 6) * 16 * 6 * 5
    quiet = {'show_table': False, 'show_arch': False}
    assert get_model_complexity_info(layer, (8, 12, 10), **quiet)['flops'] == flops
    maps = torch.zeros(3, 8, 12, 10)
    assert get_model_complexity_info(layer, inputs=(maps,), **quiet)['flops'] == 3 * flops


@pytest.mark.parametrize('family', FAMILIES)
def test_backbone(family):
    """Products are counted as PyTorch counts them, whichever backend works."""
    # mmengine rounds a product written by einsum to four digits, and misses a factor in the small
    # product of Swin's border bias, whose second factor alone has the channels.
    tolerance = 1e-3 if family.startswith('ACmix') else 0
    image = torch.zeros(1, 3, 32, 48)
    for backend in BACKENDS:
        model = FAMILIES[family](backend)
        model.eval()
        with torch.no_grad():
            with FlopCounterMode(display=False) as counter:
                model(image)
            analyzer = FlopAnalyzer(model, image).unsupported_ops_warnings(False)
            counts = analyzer.by_operator()
        products = sum(flops for name, flops in counts.items() if name not in NOT_PRODUCTS)
        expected = counter.get_total_flops() / 2
        assert products == pytest.approx(expected, rel=tolerance, abs=0), (backend, counts)
        assert not [name for name in analyzer.unsupported_ops() if name.startswith('acmix_mm')]
