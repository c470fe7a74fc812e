import copy

import pytest
import torch
import torch.nn.functional as F
from devices import device_of, slow_if_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acmix_mm.layers import XVolution
from acmix_mm.layers.x_volution import NEIGHBOURS
from acmix_mm.ops import available_backends
from acmix_mm.ops import reference as oracles


def randomise_norms(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.weight, norm.bias):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)


def random_layer(in_channels: int, out_channels: int, **arguments) -> XVolution:
    """In float64 and evaluation mode, with attention far from uniform and random statistics."""
    layer = XVolution(in_channels, out_channels, **arguments).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    randomise_norms(layer)
    return layer


def apply_kernel(kernel, bias, x, stride, groups):
    """A convolution with weights of its own at every pixel, one pixel after the other."""
    reach = kernel.size(-1) // 2
    padded = F.pad(x, (reach,) * 4)
    out = x.new_empty(len(x), len(bias), *kernel.shape[1:3])
    for i in range(len(x)):
        for row in range(kernel.size(1)):
            for column in range(kernel.size(2)):
                top, left = row * stride, column * stride
                patch = padded[i : i + 1, :, top : top + 2 * reach + 1, left : left + 2 * reach + 1]
                out[i, :, row, column] = F.conv2d(
                    patch, kernel[i, row, column], bias, groups=groups
                ).flatten()
    return out


def shifted(x: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """x(p + (down, right)) at p, pixel by pixel; zero beyond the border."""
    out = torch.zeros_like(x)
    height, width = x.shape[-2:]
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                out[..., row, column] = x[..., row + down, column + right]
    return out


def straightforward(layer: XVolution, x: torch.Tensor, **arguments) -> torch.Tensor:
    """X-volution from the paper's description: two branches, two batch norms."""
    stride, dilation, groups = layer.stride[0], layer.dilation[0], layer.groups
    convolution = F.conv2d(
        x, layer.conv.weight, None, layer.stride, layer.padding, layer.dilation, groups
    )
    if arguments.get('attention') == 'local':
        heads, size = arguments.get('num_heads', 4), arguments.get('attn_kernel_size', 7)
        query, key, value = (
            F.conv2d(x, projection.weight, groups=groups).unflatten(1, (heads, -1))
            for projection in (layer.attn.query, layer.attn.key, layer.attn.value)
        )
        query = query[..., ::stride, ::stride]
        attention = oracles.local_attention(query, key, value, size, stride, dilation).flatten(1, 2)
    else:
        products = []
        for step in range(1, arguments.get('num_steps', 1) + 1):
            length = step * arguments.get('shift', 1) * dilation
            for down, right in arguments.get('directions', NEIGHBOURS):
                products.append(x * shifted(x, down * length, right * length))
        # One weight a channel and product, channels first.
        products = torch.stack(products, 2).flatten(1, 2)
        attention = F.conv2d(products, layer.attn.conv.weight, groups=groups)
        attention = attention[..., ::stride, ::stride]
    out = 0
    for branch, norm in ((convolution, layer.conv_norm), (attention, layer.attn_norm)):
        mean, var, weight, bias = (
            tensor.view(-1, 1, 1)
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        out = out + (branch - mean) / (var + norm.eps).sqrt() * weight + bias
    return out


common = st.fixed_dictionaries(
    {
        'kernel_size': st.sampled_from([1, 3, 5]),
        'stride': st.integers(1, 3),
        'dilation': st.integers(1, 3),
        'groups': st.sampled_from([1, 2]),
    }
)
pixel_shift = st.fixed_dictionaries(
    {
        'directions': st.lists(st.sampled_from(NEIGHBOURS), min_size=1, unique=True),
        'shift': st.integers(1, 3),
        'num_steps': st.integers(1, 3),
    }
)
local = st.fixed_dictionaries(
    {
        'attention': st.just('local'),
        'num_heads': st.sampled_from([1, 2, 4]),
        'attn_kernel_size': st.sampled_from([1, 3, 5]),
    }
)


@settings(max_examples=40, deadline=None)
@given(common, pixel_shift | local, st.integers(1, 6), st.integers(1, 7), st.booleans())
def test_all_forms_are_equal(conv_arguments, attention_arguments, height, width, folds_norm):
    """The layer, the paper's description, the deployed form and its kernel applied naively."""
    torch.manual_seed(height * width)
    layer = random_layer(4, 8, **conv_arguments, **attention_arguments)
    x = torch.randn(2, 4, height, width, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    stride = conv_arguments['stride']
    assert out.shape == (2, 8, -(-height // stride), -(-width // stride))
    close = {'rtol': 1e-10, 'atol': 1e-10}
    torch.testing.assert_close(out, straightforward(layer, x, **attention_arguments), **close)

    kernel, bias = layer.dynamic_kernel(x)
    naive = apply_kernel(kernel, bias, x.detach(), stride, layer.groups)
    torch.testing.assert_close(out.detach(), naive, **close)

    norm = nn.Identity()
    if folds_norm:
        norm = nn.BatchNorm2d(8).double().eval()
        randomise_norms(norm)
    expected = norm(out)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    layer.switch_to_deploy(norm if folds_norm else None)
    layer.switch_to_deploy()
    deployed = layer(x)
    torch.testing.assert_close(deployed, expected, **close)
    torch.testing.assert_close(torch.autograd.grad(deployed, x, grad)[0], expected_grad, **close)
    kernel, bias = layer.dynamic_kernel(x)
    naive = apply_kernel(kernel, bias, x.detach(), stride, layer.groups)
    torch.testing.assert_close(naive, expected.detach(), **close)


def test_deployed_form_is_one_convolution():
    """No norm is left, one bias; of a map of zeros only the static weights."""
    layer = random_layer(4, 6)
    layer.switch_to_deploy()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in layer.modules())
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.state_dict().keys() == {'conv.weight', 'conv.bias', 'attn.conv.weight'}
    kernel, bias = layer.dynamic_kernel(torch.zeros(1, 4, 2, 3, dtype=torch.float64))
    assert kernel.shape == (1, 2, 3, 6, 4, 3, 3)
    assert torch.equal(kernel, layer.conv.weight.expand_as(kernel))
    assert torch.equal(bias, layer.conv.bias)


def test_deploy_refuses_what_it_cannot_fold():
    layer = XVolution(8, 8)
    with pytest.raises(ValueError, match=r'norm must be a batch norm .* got GroupNorm'):
        layer.switch_to_deploy(nn.GroupNorm(2, 8))
    assert not layer.deployed
    layer.switch_to_deploy()
    with pytest.raises(ValueError, match='norm must be None for an operator that is deployed'):
        layer.switch_to_deploy(nn.BatchNorm2d(8))


def test_parameters():
    """Both convolutions and norms; all have a gradient, as DistributedDataParallel demands."""
    norms = 2 * 2 * 16
    for arguments, count in (
        ({}, (9 + 8) * 8 * 16 + norms),
        ({'directions': [(0, 1), (1, 0)], 'num_steps': 3}, (9 + 6) * 8 * 16 + norms),
        ({'groups': 2}, (9 + 8) * 8 * 16 // 2 + norms),
        ({'attention': 'local'}, (9 + 3) * 8 * 16 + norms),
    ):
        layer = XVolution(8, 16, bias=True, **arguments)
        assert sum(p.numel() for p in layer.parameters()) == count
        layer(torch.randn(2, 8, 5, 6)).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize('attention', ['pixel_shift', 'local'])
class TestAsAModule:
    def test_autocast_trains(self, attention):
        layer, x = XVolution(16, 16, attention=attention), torch.randn(2, 16, 9, 12)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), layer(x), rtol=0, atol=0.1)
        out.float().square().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())

    def test_channels_last(self, attention):
        layer, x = XVolution(16, 16, stride=2, attention=attention), torch.randn(2, 16, 9, 12)
        out = layer(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(out, layer(x))

    @pytest.mark.parametrize('backend', slow_if_interpreted(available_backends()))
    def test_compiles_as_one_graph(self, attention, backend):
        layer = XVolution(8, 8, stride=2, attention=attention, backend=backend)
        layer.to(device_of(backend))
        x = torch.randn(2, 8, 9, 12).to(device_of(backend))
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend='aot_eager')
        compiled(x).square().sum().backward()
        layer(x).square().sum().backward()
        for ours, theirs in zip(layer.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'groups': 3}, r'in_channels must be divisible by groups \(3\), got 8'),
        ({'kernel_size': 2}, 'kernel_size must be a positive odd integer, got 2'),
        ({'padding': 0}, "padding must be 'same' or 1 for kernel_size 3 and dilation 1, got 0"),
        ({'attention': 'global'}, "attention must be one of .*'pixel_shift'.* got 'global'"),
        ({'directions': []}, r'directions must be different ones of .* got \(\)'),
        ({'directions': [(0, 0)]}, r'directions must be .* got \(\(0, 0\),\)'),
        ({'directions': [(0, 1), [0, 1]]}, r'directions must be .* got \(\(0, 1\), \(0, 1\)\)'),
        ({'shift': 0}, 'shift must be a positive integer, got 0'),
        ({'num_steps': 1.5}, 'num_steps must be a positive integer, got 1.5'),
        ({'attention': 'local', 'num_heads': 3}, r'out_channels .* num_heads \(3\), got 8'),
        ({'attention': 'local', 'attn_kernel_size': 4}, 'attn_kernel_size must be .* odd'),
        ({'attention': 'local', 'backend': 'fast'}, "backend must be None or one of .* got 'fast'"),
        ({'norm_cfg': {'type': 'GN', 'num_groups': 2}}, 'norm_cfg must be of a batch norm'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        XVolution(**{'in_channels': 8, 'out_channels': 8, **arguments})
