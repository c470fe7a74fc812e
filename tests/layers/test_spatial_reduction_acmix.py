import copy

import pytest
import torch
import torch.nn.functional as F
from saved_tensors import saved_bytes
from torch import nn

from acmix_mm.layers import SpatialReductionACmix
from acmix_mm.layers.mixed_operator import MIX_MODES

SpatialReductionAttention = pytest.importorskip(
    'mmdet.models.backbones.pvt'
).SpatialReductionAttention


def plain(**arguments) -> SpatialReductionAttention:
    module = SpatialReductionAttention(**{'embed_dims': 8, 'num_heads': 2, **arguments})
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double()


def build(kernel_size=3, mix='learned', **arguments) -> SpatialReductionACmix:
    return SpatialReductionACmix(plain(**arguments), kernel_size, mix).double()


def straightforward(module: SpatialReductionACmix, x, hw_shape, identity) -> torch.Tensor:
    """The operator from the formulas, with mmdet's attention path written out."""
    batch, _, channels = x.shape
    heads, dim = module.num_heads, module.head_dim
    weight, bias = module.attn.in_proj_weight, module.attn.in_proj_bias
    bias = torch.zeros(3 * channels, dtype=x.dtype) if bias is None else bias
    qkv = x @ weight.T + bias
    reduced = x
    if module.sr_ratio > 1:
        image = x.transpose(1, 2).reshape(batch, channels, *hw_shape)
        reduced = module.norm(module.sr(image).flatten(2).transpose(1, 2))
    query = qkv[..., :channels]
    key, value = (reduced @ weight.T + bias).split(channels, -1)[1:]
    paths = []
    for head in range(heads):
        own = slice(head * dim, (head + 1) * dim)
        logits = query[..., own] @ key[..., own].transpose(1, 2) / dim**0.5
        paths.append(logits.softmax(-1) @ value[..., own])
    attention = F.linear(torch.cat(paths, -1), *module.attn.out_proj.parameters())

    maps = qkv.view(batch, *hw_shape, 3 * heads, dim)
    mixed = torch.einsum('km,bhwmd->bdkhw', module.fc['weight'].flatten(1), maps).flatten(1, 2)
    kernel = module.dep_conv['weight']
    convolution = F.conv2d(mixed, kernel, padding=kernel.size(-1) // 2, groups=dim)
    convolution = convolution.flatten(2).transpose(1, 2)
    return identity + module.rate1 * attention + module.rate2 * convolution


@pytest.mark.parametrize('sr_ratio', [1, 2])
@pytest.mark.parametrize(
    'arguments', [{}, {'num_heads': 4, 'kernel_size': 5}, {'num_heads': 1, 'qkv_bias': False}]
)
def test_equals_the_formulas(sr_ratio, arguments):
    module = build(sr_ratio=sr_ratio, **arguments)
    nn.init.normal_(module.dep_conv['weight'])
    x, identity = (torch.randn(2, 35, 8, dtype=torch.float64) for _ in range(2))
    x.requires_grad_()
    out = module(x, (5, 7), identity)
    expected = straightforward(module, x, (5, 7), identity)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(module(x, (5, 7)), out - identity + x)
    leaves = (x, *module.parameters())
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@pytest.mark.parametrize('sr_ratio', [1, 2])
@pytest.mark.parametrize('qkv_bias', [True, False])
def test_equals_plain_attention(sr_ratio, qkv_bias):
    attention = plain(sr_ratio=sr_ratio, qkv_bias=qkv_bias)
    module = SpatialReductionACmix(copy.deepcopy(attention)).double()
    nn.init.ones_(module.rate1)
    nn.init.zeros_(module.rate2)
    x, identity = (torch.randn(2, 35, 8, dtype=torch.float64) for _ in range(2))
    expected = attention(x, (5, 7), identity)
    torch.testing.assert_close(module(x, (5, 7), identity), expected)
    ours, theirs = module.state_dict().keys(), attention.state_dict().keys()
    assert ours - theirs == {'fc.weight', 'dep_conv.weight', 'rate1', 'rate2'}
    assert not theirs - ours


@pytest.mark.parametrize('sr_ratio', [1, 2])
def test_mix_modes(sr_ratio):
    x = torch.randn(1, 35, 8, dtype=torch.float64)
    learned = build(sr_ratio=sr_ratio)
    rates = {
        'learned': (0.5, 0.5),
        'complementary': (0.3, 0.7),
        'sum': (1, 1),
        'attention': (1, 0),
        'conv': (0, 1),
    }
    assert rates.keys() == set(MIX_MODES)
    for mode, (rate1, rate2) in rates.items():
        module = build(mix=mode, sr_ratio=sr_ratio)
        module.load_state_dict(learned.state_dict(), strict=False)
        with torch.no_grad():
            if mode == 'complementary':
                module.rate1.fill_(rate1)
            learned.rate1.fill_(rate1)
            learned.rate2.fill_(rate2)
        expected = learned(x, (5, 7))
        torch.testing.assert_close(module(x, (5, 7)), expected)
        # DistributedDataParallel refuses parameters without gradient.
        module(x, (5, 7)).square().sum().backward()
        assert all(p.grad is not None for p in module.parameters()), mode
        module.switch_to_deploy()
        torch.testing.assert_close(module(x, (5, 7)), expected)


@pytest.mark.parametrize('name', ['attn_drop', 'proj_drop'])
def test_dropout(name):
    module = build(**{name: 0.5})
    x = torch.randn(1, 35, 8, dtype=torch.float64)
    assert not torch.equal(module(x, (5, 7)), module(x, (5, 7)))
    module.eval()
    assert torch.equal(module(x, (5, 7)), module(x, (5, 7)))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'kernel_size': 2}, 'kernel_size must be a positive odd integer, got 2'),
        ({'mix': 'both'}, "mix must be one of .*'learned'.* got 'both'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize('sr_ratio', [1, 2])
def test_second_order_gradients(sr_ratio):
    module = build(sr_ratio=sr_ratio)
    x = torch.randn(1, 20, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: module(x, (4, 5)), x)


@pytest.mark.parametrize('batch', [1, 2])
def test_gradients_of_one_pixel(batch):
    """Where maps are tokens and planes at once."""
    module = build()
    x = torch.randn(batch, 1, 8, dtype=torch.float64, requires_grad=True)
    leaves = (x, *module.parameters())
    torch.autograd.gradcheck(lambda x, *parameters: module(x, (1, 1)), leaves)


@pytest.mark.parametrize('sr_ratio', [1, 4])
def test_saves_no_more_than_the_plain_operator(sr_ratio):
    attention = SpatialReductionAttention(32, 2, sr_ratio=sr_ratio)
    module = SpatialReductionACmix(copy.deepcopy(attention))
    x = torch.randn(1, 32 * 32, 32, requires_grad=True)
    ours, theirs = (saved_bytes(lambda m=m: m(x, (32, 32))) for m in (module, attention))
    assert ours < 1.1 * theirs
