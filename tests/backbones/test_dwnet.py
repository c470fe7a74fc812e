import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm.backbones import DWNet
from acmix_mm.layers import DepthwiseBlock

KINDS = [None, 'homogeneous', 'inhomogeneous']


def small(dynamic=None, **arguments) -> DWNet:
    return DWNet({'embed_dims': 32, 'depths': (2, 1, 1, 1)}, dynamic, **arguments)


# Exact counts, each within 2 % of what the release prints, but of inhomogeneous kernels, where it
# prints nothing: the static counts with the predictors of 32 kernels in place of the kernels.
@pytest.mark.parametrize(
    ('arch', 'dynamic', 'parameters', 'flops', 'published'),
    [
        ('tiny', None, 24_172_744, 3_726_862_848, (24e6, 3.8e9)),
        ('tiny', 'homogeneous', 51_131_752, 3_753_819_648, (51e6, 3.8e9)),
        ('tiny', 'inhomogeneous', 26_244_280, 4_374_133_248, None),
        ('base', None, 74_347_112, 12_812_261_376, (74e6, 12.9e9)),
        ('base', 'homogeneous', 161_597_928, 12_899_506_176, (162e6, 13.0e9)),
        ('base', 'inhomogeneous', 80_253_608, 14_340_020_224, None),
    ],
)
def test_size_and_cost(arch, dynamic, parameters, flops, published):
    """With the norm after the last stage and a 1000-way classifier.

    FLOPs are multiplications of products, convolutions and aggregation at 224. The paper's include
    those of norms and ReLU.
    """
    model = DWNet(arch, dynamic, out_indices=(3,))
    head = nn.Linear(model.num_features[-1], 1000)
    assert sum(p.numel() for m in (model, head) for p in m.parameters()) == parameters
    model, head = model.to('meta'), head.to('meta')
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        (out,) = model(torch.empty(1, 3, 224, 224, device='meta'))
        head(out.mean((2, 3)))
    assert counter.get_total_flops() == 2 * flops
    if published:
        assert (parameters, flops) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize('dynamic', KINDS)
@settings(max_examples=5, deadline=None)
@given(size=st.tuples(st.integers(1, 70), st.integers(1, 70)))
def test_any_size(dynamic, size):
    model = small(dynamic)
    model.eval()
    with torch.no_grad():
        outs = model(torch.randn(1, 3, *size))
    stem = [-(-s // 4) for s in size]
    for level, out in enumerate(outs):
        assert out.shape == (1, 32 * 2**level, *(-(-s // 2**level) for s in stem))
        assert torch.isfinite(out).all()


def test_the_map_is_not_padded_to_windows():
    """A block of 5x9 positions is the formula on 5x9 positions."""
    block = small().stages[0].blocks[0].double().eval()
    x = torch.randn(2, 45, 32, dtype=torch.float64)
    maps = x.transpose(1, 2).view(2, 32, 5, 9)
    maps = maps + block.attn2conv(maps)
    tokens = block.bn(maps).flatten(2).transpose(1, 2)
    first, second = block.ffn.layers[0][0], block.ffn.layers[1]
    tokens = nn.functional.gelu(tokens @ first.weight.T + first.bias) @ second.weight.T
    expected = maps.flatten(2).transpose(1, 2) + tokens + second.bias
    torch.testing.assert_close(block(x, (5, 9)), expected)


def test_norms():
    """Batch norms but in patch embedding and merging, as in the release."""
    model = small()
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert name == 'patch_embed.norm' or name.endswith('downsample.norm')
    assert all(isinstance(getattr(model, f'norm{i}'), nn.BatchNorm2d) for i in range(4))
    # One before the perceptron, three in the operator.
    norms = [m for m in model.stages.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4 * 5


@pytest.mark.parametrize('arch', ['tiny', 'base'])
def test_drop_path_rises(arch):
    model = DWNet(arch)
    rates = [b.drop_path.drop_prob for stage in model.stages for b in stage.blocks]
    last = {'tiny': 0.2, 'base': 0.5}[arch]
    torch.testing.assert_close(
        rates, torch.linspace(0, last, len(rates)).tolist(), rtol=1e-5, atol=1e-7
    )
    ffn = [b.ffn.dropout_layer.drop_prob for stage in model.stages for b in stage.blocks]
    assert ffn == rates
    assert small(drop_path_rate=0.1).stages[3].blocks[0].drop_path.drop_prob == pytest.approx(0.1)


def test_registered_and_arguments_reach_the_operator():
    model = MODELS.build(
        {
            'type': 'DWNet',
            'arch': {'embed_dims': 32, 'depths': [1, 1, 1, 1]},
            'dynamic': 'inhomogeneous',
            'kernel_size': 5,
            'norm_cfg': {'type': 'SyncBN'},
            'in_channels': 4,
            'out_indices': [1, 3],
        }
    )
    model.init_weights()
    operators = [m for m in model.modules() if isinstance(m, DepthwiseBlock)]
    assert [m.conv.kernel_size for m in operators] == [5] * 4
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert [out.size(1) for out in model(torch.randn(2, 4, 32, 32))] == [64, 256]


@pytest.mark.parametrize('dynamic', KINDS)
def test_loads_the_release(tmp_path, dynamic):
    """All of the names of its classification network, whose norm and head are left over."""
    source = small(dynamic)
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1)
    renamed = {'norm.weight': torch.ones(256), 'head.weight': torch.ones(10, 256)}
    for name, tensor in source.state_dict().items():
        if not name.startswith('norm'):
            name = name.replace('stages', 'layers').replace('projection', 'proj')
            name = name.replace('ffn.layers.0.0', 'mlp.fc1').replace('ffn.layers.1', 'mlp.fc2')
            renamed[name] = tensor
    torch.save({'model': renamed}, tmp_path / 'published.pth')
    model = small(
        dynamic,
        convert_weights=True,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth')),
    )
    model.init_weights()
    loaded = model.state_dict()
    for name, tensor in source.state_dict().items():
        if 'downsample' in name:  # mmdet orders the four neighbours otherwise than Swin's code
            torch.testing.assert_close(loaded[name].sum(), tensor.sum())
        elif tensor.is_floating_point():
            assert torch.equal(loaded[name], tensor) != name.startswith('norm'), name


def test_init_weights():
    model = small('homogeneous')
    model.init_weights()
    weight = model.stages[3].blocks[0].ffn.layers[0][0].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    operator = model.stages[3].blocks[0].attn2conv
    assert operator.conv0.weight.abs().max().item() == pytest.approx(1 / 16, rel=0.01)


@pytest.mark.parametrize('dynamic', KINDS)
def test_every_parameter_is_trained(dynamic):
    """DistributedDataParallel refuses one without gradient."""
    model = small(dynamic, drop_path_rate=0.0)
    weights = [torch.randn(2, 32 * 2**i, 1, 1) for i in range(4)]
    outs = model(torch.randn(2, 3, 64, 64))
    sum((out * w).mean() for out, w in zip(outs, weights, strict=True)).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_frozen_stages():
    model = small(frozen_stages=2)
    model.train()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(('patch_embed', 'stages.0', 'stages.1', 'norm0', 'norm1'))
        assert parameter.requires_grad is not frozen, name
    assert not model.stages[1].blocks[0].bn.training
    assert model.stages[2].blocks[0].bn.training


@pytest.mark.parametrize('dynamic', KINDS)
def test_with_cp_gives_the_same_step(dynamic):
    """Outputs, gradients and running statistics, which the computation anew must not touch."""
    x = torch.randn(2, 3, 40, 40)
    plain, checkpointed = (small(dynamic, drop_path_rate=0.3, with_cp=c) for c in (False, True))
    checkpointed.load_state_dict(plain.state_dict())
    steps = []
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(1)
        outs = model(x)
        sum(o.abs().mean() for o in outs).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        steps.append((outs, grads, dict(model.named_buffers())))
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'arch': 'small'}, "arch must be 'tiny', 'base' or a dict .* got 'small'"),
        ({'arch': {'embed_dims': 32}}, "arch must be 'tiny', 'base' or a dict .* got {'embed_dims"),
        ({'dynamic': 'both'}, "dynamic must be None or one of .* got 'both'"),
        ({'dynamic': True}, 'dynamic must be None or one of .* got True'),
        ({'kernel_size': 4}, 'kernel_size must be a positive odd integer, got 4'),
        ({'out_indices': (4,)}, r'out_indices must be of 0, 1, 2, 3, got \(4,\)'),
        (
            {'arch': {'embed_dims': 24, 'depths': (1, 1, 1, 1)}, 'dynamic': 'inhomogeneous'},
            'channels must be a multiple of 32, got 24',
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DWNet(**arguments)
