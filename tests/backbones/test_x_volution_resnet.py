import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.registry import MODELS
from torch import nn

from acmix_mm.backbones import XVolutionResNet
from acmix_mm.layers import XVolution


def small(**arguments) -> XVolutionResNet:
    return XVolutionResNet(**{'depth': 26, 'base_channels': 8, **arguments})


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ('depth', 'layers'), [(18, 4), (26, 4), (34, 12), (50, 6), (101, 23)]
)  # of the third stage: two of a basic block, one of a bottleneck
def test_parameter_count(depth, layers):
    """Beside the plain ResNet: eight 1x1 matrices and two norms a layer, at 256 channels.

    Only the first layer of basic blocks, from 128 channels, has half of the matrices.
    """
    with torch.device('meta'):
        model = XVolutionResNet(depth)
        plain = XVolutionResNet(depth, stage_with_xvolution=(False,) * 4)
        if depth != 26:
            assert plain.state_dict().keys() == ResNet(depth).state_dict().keys()
            assert count(plain) == count(ResNet(depth))
    half = 0.5 if depth in (18, 34) else 0
    assert count(model) - count(plain) == (layers - half) * 8 * 256**2 + layers * 4 * 256
    replaced = {n.split('.')[0] for n, m in model.named_modules() if isinstance(m, XVolution)}
    assert replaced == {'layer3'}


@pytest.mark.parametrize('depth', [18, 26, 34, 50, 101])
@pytest.mark.parametrize('size', [(1, 1), (17, 33)])
def test_shapes(depth, size):
    model = MODELS.build({'type': 'XVolutionResNet', 'depth': depth, 'base_channels': 8})
    model.init_weights()
    outs = model(torch.randn(2, 3, *size))
    stem = [-(-s // 4) for s in size]
    for level, out in enumerate(outs):
        channels = (8 if depth in (18, 34) else 32) * 2**level
        assert out.shape == (2, channels, *(-(-s // 2**level) for s in stem))


def test_arguments_reach_the_layer():
    model = small(
        depth=18,
        attention='local',
        num_heads=2,
        attn_kernel_size=5,
        conv_kernel_size=1,
        backend='torch',
        stage_with_xvolution=(True, False, False, True),
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        norm_cfg={'type': 'SyncBN', 'requires_grad': False},
    )
    layer = model.layer4[0].conv1
    assert (layer.attn.num_heads, layer.attn.kernel_size, layer.kernel_size) == (2, 5, (1, 1))
    assert (layer.stride, layer.dilation, layer.attn.backend) == ((1, 1), (2, 2), 'torch')
    assert isinstance(layer.attn_norm, nn.SyncBatchNorm)
    assert not layer.attn_norm.weight.requires_grad
    replaced = {n for n, m in model.named_modules() if isinstance(m, XVolution)}
    assert replaced == {
        f'layer{stage}.{block}.conv{i}' for stage in (1, 4) for block in (0, 1) for i in (1, 2)
    }
    layer = small(directions=[[0, 1], [-1, 0]], shift=2, num_steps=2).layer3[0].conv2
    assert layer.attn.offsets == ((0, 2), (-2, 0), (0, 4), (-4, 0))


def test_frozen_stages_norm_eval_and_initialisation():
    model = small(depth=18, frozen_stages=3, norm_eval=True)
    model.init_weights()
    assert not model.layer3[1].bn2.weight.any()  # norm2 starts at zero, as in mmdet
    assert (model.layer3[1].conv2.attn_norm.weight == 1).all()
    model.train()
    assert not any(p.requires_grad for p in model.layer3.parameters())
    assert all(p.requires_grad for p in model.layer4.parameters())
    model = small(norm_eval=True)
    model.train()
    assert not model.layer3[0].conv2.attn_norm.training


def test_with_cp_gives_the_same_gradients():
    x = torch.randn(1, 3, 40, 40)
    plain, checkpointed = small(), small(with_cp=True)
    checkpointed.load_state_dict(plain.state_dict())
    for model in (plain, checkpointed):
        model.train()
        model(x.clone().requires_grad_())[-1].square().mean().backward()
    for ours, theirs in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    'arguments',
    [
        {},
        {'depth': 18, 'stage_with_xvolution': (True, False, True, True)},
        {'attention': 'local', 'deep_stem': True},
        {'conv_cfg': {'type': 'ConvWS'}},
    ],
)
def test_deploy_form(arguments):
    model = small(**arguments).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    x = torch.randn(2, 3, 33, 50, dtype=torch.float64)
    expected = model(x)
    for _ in range(2):
        model.switch_to_deploy()
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert all(m.deployed for m in model.modules() if isinstance(m, XVolution))
    if 'conv_cfg' not in arguments:
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())

    built = small(**arguments, deploy=True).double()
    built.load_state_dict(model.state_dict())
    built.eval()
    torch.testing.assert_close(built(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'depth': 38}, r'depth must be one of \(18, 34, 50, 101, 26\), got 38'),
        ({'attention': 'none'}, "attention must be one of .* got 'none'"),
        ({'dcn': {'type': 'DCNv2'}}, r'dcn must be None, .* with stage_with_xvolution'),
        ({'stage_with_xvolution': (True,)}, 'stage_with_xvolution must have a value for each of 4'),
        ({'norm_cfg': {'type': 'GN', 'num_groups': 2}}, 'norm_cfg must be of a batch norm'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
