"""The layers that mmengine's registry knows as layer types, in models of OpenMMLab."""

import pytest
import torch
from torch import nn

from acmix_mm import deploy, set_backend
from acmix_mm.layers import ACmix, XVolution
from acmix_mm.layers.mixing_weights import shift_kernel
from acmix_mm.layers.x_volution import ATTENTIONS

pytest.importorskip('mmdet')
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.models.backbones import ResNet, ResNeXt
from mmdet.models.necks import FPN

LAYERS = {
    'ACmix': {'num_heads': 2, 'attn_kernel_size': 5, 'mix': 'sum', 'backend': 'torch'},
    'XVolution': {'attention': 'local', 'num_heads': 2, 'norm_cfg': {'type': 'BN'}},
}


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


@pytest.mark.parametrize('name', LAYERS)
def test_weights_of_the_plain_network_load(name):
    """All but the kernels of the convolutions that the layer replaces."""
    weights = ResNet(50, base_channels=8).state_dict()
    stages = (False, False, True, False)
    model = ResNet(50, base_channels=8, dcn={'type': name}, stage_with_dcn=stages)
    replaced = {f'layer3.{i}.conv2.weight' for i in range(6)}
    assert set(model.load_state_dict(weights, strict=False).unexpected_keys) <= replaced
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in weights.items() if k not in replaced)


def test_conv_cfg_of_a_neck():
    neck = FPN([8, 16], 8, num_outs=3, add_extra_convs='on_input', conv_cfg={'type': 'ACmix'})
    neck.init_weights()
    assert all(isinstance(m.conv, nn.Conv2d) for m in neck.lateral_convs)  # 1x1
    layers = [m.conv for m in neck.fpn_convs]
    assert len(layers) == 3
    for layer in layers:
        assert isinstance(layer, ACmix)
        kernel = shift_kernel(layer.out_channels, layer.head_dim, layer.kernel_size[0])
        assert torch.equal(layer.dep_conv['weight'], kernel)
    outs = neck([torch.randn(1, 8, 12, 10), torch.randn(1, 16, 6, 5)])
    assert [o.shape[-2:] for o in outs] == [(12, 10), (6, 5), (3, 3)]


@pytest.mark.parametrize('kernel_size', [1, (1, 1), [1, 1]])
@pytest.mark.parametrize('name', LAYERS)
def test_1x1_convolutions_stay(name, kernel_size):
    """What the layer alone has is left out, and the rest is as nn.Conv2d takes it."""
    cfg = {'type': name, **LAYERS[name]}
    layer = build_conv_layer(cfg, 8, 4, kernel_size, stride=2, padding=0, groups=2)
    assert type(layer) is nn.Conv2d
    expected = nn.Conv2d(8, 4, kernel_size, stride=2, padding=0, groups=2)
    assert repr(layer) == repr(expected)
    layer = build_conv_layer(cfg, 8, 4, kernel_size, 2, 0, 1, 4, False)
    assert repr(layer) == repr(nn.Conv2d(8, 4, kernel_size, 2, 0, 1, 4, False))


@pytest.mark.parametrize(('name', 'kind'), [('ACmix', ACmix), ('XVolution', XVolution)])
def test_1x1_convolutions_are_replaced_if_asked_for(name, kind):
    cfg = {'type': name, **LAYERS[name], 'replace_1x1': True}
    layer = build_conv_layer(cfg, 8, 4, 1, stride=2, padding=0)
    assert isinstance(layer, kind)
    assert layer.kernel_size == (1, 1)
    assert isinstance(build_conv_layer(cfg, 8, 4, 3, padding=1), kind)
    neck = FPN([8, 16], 8, num_outs=2, conv_cfg=cfg)
    assert sum(isinstance(m, kind) for m in neck.modules()) == 4


@pytest.mark.parametrize(
    ('channels', 'arguments'),
    [
        ((3, 8), {'kernel_size': 7, 'stride': 2, 'padding': 3}),  # stems
        ((4, 8), {'kernel_size': 3, 'padding': 1}),
        ((8, 8), {'kernel_size': 2, 'stride': 2}),  # patch embedding
        ((8, 8), {'kernel_size': 4, 'stride': 2, 'padding': 1}),
        ((8, 8), {'kernel_size': (1, 7), 'padding': (0, 3)}),
        ((8, 8), {'kernel_size': 3, 'stride': (2, 1), 'padding': 1}),
        ((8, 8), {'kernel_size': 3, 'padding': 0}),
        ((8, 8), {'kernel_size': 3, 'padding': 'valid'}),
        ((8, 8), {'kernel_size': 3, 'padding': 1, 'dilation': 2}),
        ((8, 16), {'kernel_size': 3, 'padding': 1, 'groups': 8}),  # depth-wise
    ],
)
@pytest.mark.parametrize('name', LAYERS)
def test_what_the_layer_cannot_stand_for_stays(name, channels, arguments):
    layer = build_conv_layer({'type': name, **LAYERS[name]}, *channels, **arguments)
    assert type(layer) is nn.Conv2d
    assert repr(layer) == repr(nn.Conv2d(*channels, **arguments))


@pytest.mark.parametrize(
    'arguments',
    [
        {'kernel_size': 3, 'padding': 1},
        {'kernel_size': (3, 3), 'padding': (1, 1), 'stride': [2, 2]},
        {'kernel_size': 5, 'padding': 4, 'dilation': 2},
        {'kernel_size': 3, 'padding': 'same', 'groups': 2},
        {'kernel_size': 3},  # the layer's own default is to keep the size
    ],
)
@pytest.mark.parametrize(('name', 'kind'), [('ACmix', ACmix), ('XVolution', XVolution)])
def test_what_the_layer_stands_for(name, kind, arguments):
    layer = build_conv_layer({'type': name, **LAYERS[name]}, 8, 8, **arguments)
    assert isinstance(layer, kind)
    stride = 2 if 'stride' in arguments else 1
    assert layer.eval()(torch.randn(1, 8, 9, 8)).shape[-2:] == (-(-9 // stride), 8 // stride)


@pytest.mark.parametrize('deep_stem', [False, True])
def test_conv_cfg_of_a_backbone(deep_stem):
    """Its 3x3 convolutions but the one of the image; stem and shortcuts stay."""
    cfg = {'type': 'ACmix', 'attn_kernel_size': 3}
    model = ResNet(
        50, base_channels=8, stem_channels=16, deep_stem=deep_stem, conv_cfg=cfg, norm_eval=False
    )
    replaced = {name for name, m in model.named_modules() if isinstance(m, ACmix)}
    expected = {f'layer{i + 1}.{j}.conv2' for i, n in enumerate((3, 4, 6, 3)) for j in range(n)}
    assert replaced == expected | ({'stem.3', 'stem.6'} if deep_stem else set())
    assert [o.shape[-1] for o in model(torch.randn(2, 3, 33, 45))] == [12, 6, 3, 2]


@pytest.mark.parametrize('name', LAYERS)
def test_form_for_inference(name):
    """A model whose config has deploy=True in the layer's place takes checkpoints of that form."""
    cfg = {'type': name, **LAYERS[name]}
    neck = FPN([8, 16], 8, num_outs=2, conv_cfg=cfg).eval()
    maps = [torch.randn(1, 8, 12, 10), torch.randn(1, 16, 6, 5)]
    expected = neck(maps)
    other = FPN([8, 16], 8, num_outs=2, conv_cfg={**cfg, 'deploy': True}).eval()
    other.load_state_dict(deploy(neck).state_dict())
    torch.testing.assert_close(other(maps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('name', LAYERS)
def test_unknown_arguments_are_refused(name, kernel_size):
    with pytest.raises(TypeError, match='number_of_heads'):
        build_conv_layer({'type': name, 'number_of_heads': 2}, 8, 4, kernel_size)


def test_models_with_the_layer_deploy_and_take_a_backend():
    neck = FPN([8, 16], 8, num_outs=2, conv_cfg={'type': 'ACmix'}).eval()
    maps = [torch.randn(1, 8, 12, 10), torch.randn(1, 16, 6, 5)]
    expected = neck(maps)
    assert set_backend(neck, 'torch').fpn_convs[0].conv.backend == 'torch'
    deploy(neck)
    assert all(m.conv.deployed for m in neck.fpn_convs)
    torch.testing.assert_close(neck(maps), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('attention', ATTENTIONS)
def test_x_volution(attention):
    cfg = {'type': 'XVolution', 'attention': attention}
    layer = build_conv_layer(cfg, 8, 4, 3, padding=1, bias=False)
    assert isinstance(layer, XVolution)
    module = ConvModule(8, 8, 3, stride=2, padding=2, dilation=2, conv_cfg=cfg)
    assert module(torch.randn(1, 8, 9, 9)).shape == (1, 8, 5, 5)
    neck = FPN([8, 16], 8, num_outs=3, add_extra_convs='on_input', conv_cfg=cfg)
    neck.init_weights()
    assert sum(isinstance(m, XVolution) for m in neck.modules()) == 3
    outs = neck([torch.randn(2, 8, 12, 10), torch.randn(2, 16, 6, 5)])
    assert [o.shape[-2:] for o in outs] == [(12, 10), (6, 5), (3, 3)]
    stages = (False, False, True, False)
    model = ResNet(50, base_channels=8, dcn=cfg, stage_with_dcn=stages)
    assert sum(isinstance(m, XVolution) for m in model.modules()) == 6
    assert model(torch.randn(1, 3, 33, 45))[2].shape == (1, 128, 3, 3)
