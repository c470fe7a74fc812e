"""The layers that mmengine's registry knows as layer types, in models of OpenMMLab."""

import pytest
import torch

from acmix_mm.layers import ACmix, XVolution
from acmix_mm.layers.mixing_weights import shift_kernel
from acmix_mm.layers.x_volution import ATTENTIONS

pytest.importorskip('mmdet')
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.models.necks import FPN


def test_registered():
    layer = build_conv_layer({'type': 'ACmix', 'num_heads': 2}, 8, 4, 3, padding=1, bias=False)
    assert isinstance(layer, ACmix)
    assert layer.num_heads == 2


def test_conv_module():
    module = ConvModule(8, 8, 3, stride=2, padding=1, conv_cfg={'type': 'ACmix'})
    assert module(torch.randn(1, 8, 9, 9)).shape == (1, 8, 5, 5)
    assert torch.equal(module.conv.dep_conv['weight'], shift_kernel(8, 2, 3))


@pytest.mark.parametrize(
    ('backbone', 'arguments'), [(ResNet, {}), (ResNeXt, {'groups': 8, 'base_width': 4})]
)
def test_dcn_of_mmdet_backbones(backbone, arguments):
    model = backbone(
        depth=50,
        dcn={'type': 'ACmix'},
        stage_with_dcn=(False, True, True, True),
        base_channels=16 if backbone is ResNet else 64,
        **arguments,
    )
    model.init_weights()
    model.train()
    layers = [m for m in model.modules() if isinstance(m, ACmix)]
    assert len(layers) == 4 + 6 + 3
    for layer in layers:
        kernel = shift_kernel(layer.out_channels, layer.head_dim, 3)
        assert torch.equal(layer.dep_conv['weight'], kernel)
    outs = model(torch.randn(1, 3, 45, 33))
    assert [o.shape[-2:] for o in outs] == [(12, 9), (6, 5), (3, 3), (2, 2)]
    sum(o.mean() for o in outs).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_conv_cfg_of_a_neck():
    neck = FPN([8, 16], 8, num_outs=3, add_extra_convs='on_input', conv_cfg={'type': 'ACmix'})
    neck.init_weights()
    layers = [m for m in neck.modules() if isinstance(m, ACmix)]
    assert len(layers) == 5
    for layer in layers:
        kernel = shift_kernel(layer.out_channels, layer.head_dim, layer.kernel_size[0])
        assert torch.equal(layer.dep_conv['weight'], kernel)
    outs = neck([torch.randn(1, 8, 12, 10), torch.randn(1, 16, 6, 5)])
    assert [o.shape[-2:] for o in outs] == [(12, 10), (6, 5), (3, 3)]


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_x_volution(attention):
    cfg = {'type': 'XVolution', 'attention': attention}
    layer = build_conv_layer(cfg, 8, 4, 3, padding=1, bias=False)
    assert isinstance(layer, XVolution)
    module = ConvModule(8, 8, 3, stride=2, padding=2, dilation=2, conv_cfg=cfg)
    assert module(torch.randn(1, 8, 9, 9)).shape == (1, 8, 5, 5)
    neck = FPN([8, 16], 8, num_outs=3, add_extra_convs='on_input', conv_cfg=cfg)
    neck.init_weights()
    outs = neck([torch.randn(2, 8, 12, 10), torch.randn(2, 16, 6, 5)])
    assert [o.shape[-2:] for o in outs] == [(12, 10), (6, 5), (3, 3)]
    stages = (False, False, True, False)
    model = ResNet(50, base_channels=8, dcn=cfg, stage_with_dcn=stages)
    assert sum(isinstance(m, XVolution) for m in model.modules()) == 6
    assert model(torch.randn(1, 3, 33, 45))[2].shape == (1, 128, 3, 3)
