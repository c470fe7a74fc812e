"""The operator of DWNet, and what its paper says of it: local attention is a depth-wise convolution
whose weights are computed otherwise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acmix_mm.layers import (
    DepthwiseBlock,
    HomogeneousDepthwiseConv,
    InhomogeneousDepthwiseConv,
    WindowACmix,
)
from acmix_mm.ops import local_attention


@pytest.mark.parametrize(
    ('name', 'dynamic'), [('dwnet_block_static', None), ('dwnet_block_dynamic', 'homogeneous')]
)
def test_golden(golden, name, dynamic):
    tensors = golden(name)
    block = DepthwiseBlock(24, 7, dynamic).double().eval()
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    missing, unexpected = block.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith('num_batches_tracked') for name in missing)
    out = block(tensors['input'].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, tensors['output'], rtol=1e-5, atol=1e-5)


def test_golden_inhomogeneous(golden):
    """Output and all gradients, to float32's rounding of the stored results."""
    tensors = golden('dwnet_block_inhomogeneous')
    block = DepthwiseBlock(96, 7, 'inhomogeneous').double().eval()
    state = {k.removeprefix('state/'): v for k, v in tensors.items() if k.startswith('state/')}
    block.load_state_dict(state)
    x = tensors['input'].requires_grad_()
    out = block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    out.backward(tensors['grad_output'])
    results = {'output': out, 'grad/input': x.grad}
    results |= {f'grad/{name}': p.grad for name, p in block.named_parameters()}
    assert set(results) == {k for k in tensors if k == 'output' or k.startswith('grad/')}
    for name, result in results.items():
        tolerance = 1e-7 * tensors[name].abs().max().item()
        torch.testing.assert_close(result, tensors[name], rtol=0, atol=tolerance, msg=name)


SIZES = st.tuples(st.integers(1, 11), st.integers(1, 11))


def randomise(module: nn.Module) -> nn.Module:
    """Weights, biases and statistics of norms at random, in evaluation mode."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.2, 1)
    return module.eval()


def depthwise(x: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Sum over shifted maps, with zeros outside: (B, C, H, W), (B, C, k, k, H, W)."""
    radius, (height, width) = kernel.size(2) // 2, x.shape[-2:]
    padded = F.pad(x, [radius] * 4)
    return sum(
        kernel[:, :, i, j] * padded[:, :, i : i + height, j : j + width]
        for i in range(kernel.size(2))
        for j in range(kernel.size(3))
    )


@settings(max_examples=20, deadline=None)
@given(size=SIZES, kernel_size=st.sampled_from([1, 3, 7]))
def test_homogeneous_kernels_are_of_each_image(size, kernel_size):
    conv = randomise(HomogeneousDepthwiseConv(8, kernel_size).double())
    x = torch.randn(3, 8, *size, dtype=torch.float64)
    out = conv(x)
    for image, result in zip(x, out, strict=True):
        hidden = conv.conv1.weight[:, :, 0, 0] @ image.mean((1, 2))
        hidden = (hidden - conv.bn.running_mean) / (conv.bn.running_var + 1e-5).sqrt()
        hidden = (hidden * conv.bn.weight + conv.bn.bias).relu()
        kernel = conv.conv2.weight[:, :, 0, 0] @ hidden + conv.conv2.bias
        kernel = kernel.view(1, 8, kernel_size, kernel_size, 1, 1)
        expected = depthwise(image[None], kernel)[0] + conv.bias[:, None, None]
        torch.testing.assert_close(result, expected)


@settings(max_examples=20, deadline=None)
@given(size=SIZES, kernel_size=st.sampled_from([1, 3, 7]))
def test_inhomogeneous_kernels_are_of_each_position(size, kernel_size):
    conv = randomise(InhomogeneousDepthwiseConv(64, kernel_size).double())
    x = torch.randn(2, 64, *size, dtype=torch.float64)
    first, norm, _ = conv.conv1
    hidden = torch.einsum('oi,bihw->bhwo', first.weight[:, :, 0, 0], x) + first.bias
    hidden = (hidden - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
    hidden = (hidden * norm.weight + norm.bias).relu()
    kernel = hidden @ conv.conv2[0].weight[:, :, 0, 0].T + conv.conv2[0].bias
    # 32 kernels, of 2 adjacent channels each.
    kernel = kernel.view(2, *size, 32, kernel_size, kernel_size).permute(0, 3, 4, 5, 1, 2)
    expected = depthwise(x, kernel.repeat_interleave(2, 1))
    torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize('dynamic', ['homogeneous', 'inhomogeneous'])
def test_constant_prediction_is_the_static_operator(dynamic):
    """Where the image has no say in the kernel, borders included."""
    static = randomise(DepthwiseBlock(64).double())
    block = DepthwiseBlock(64, dynamic=dynamic).double().eval()
    own = {k: v for k, v in static.state_dict().items() if not k.startswith('conv.')}
    block.load_state_dict(own, strict=False)
    if dynamic == 'homogeneous':
        predictor, kernel = block.conv.conv2, static.conv.weight
        block.conv.bias.data = static.conv.bias.data
    else:  # which has no bias, and 32 kernels for 64 channels
        predictor, kernel = block.conv.conv2[0], static.conv.weight[::2]
        static.conv.weight.data = kernel.repeat_interleave(2, 0)
        static.conv.bias.data.zero_()
    predictor.weight.data.zero_()
    predictor.bias.data = kernel.flatten()
    x = torch.randn(2, 64, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), static(x))


@pytest.mark.parametrize('dynamic', [None, 'homogeneous', 'inhomogeneous'])
def test_trains_in_half_precision(dynamic):
    block = DepthwiseBlock(32, 3, dynamic)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = block(torch.randn(2, 32, 6, 5))
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize('dynamic', [None, 'homogeneous', 'inhomogeneous'])
def test_compiles(dynamic):
    block = DepthwiseBlock(32, 3, dynamic).eval()
    compiled = torch.compile(block, backend='aot_eager', fullgraph=True)
    x = torch.randn(2, 32, 6, 5)
    torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize('dynamic', [None, 'homogeneous', 'inhomogeneous'])
def test_norm_layer_makes_all_norms(dynamic):
    block = DepthwiseBlock(32, 3, dynamic, nn.SyncBatchNorm)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    count = sum(isinstance(m, nn.SyncBatchNorm) for m in block.modules())
    assert count == (4 if dynamic else 3)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'dynamic': 'both'}, "dynamic must be None or one of .* got 'both'"),
        ({'kernel_size': 4}, 'kernel_size must be a positive odd integer, got 4'),
        ({'channels': 0}, 'channels must be a positive integer, got 0'),
        ({'channels': 3, 'dynamic': 'homogeneous'}, 'channels must be at least 4, got 3'),
        ({'channels': 48, 'dynamic': 'inhomogeneous'}, 'channels must be a multiple of 32, got 48'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DepthwiseBlock(**{'channels': 32, **arguments})


# The connection that the paper draws (sections 2 and 3): local attention with weights that do not
# depend on the image is a depth-wise convolution with those weights, shared by a head's channels.


def test_local_attention_of_zero_queries_is_a_depthwise_mean():
    query, key, value = torch.randn(3, 2, 3, 4, 9, 11, dtype=torch.float64)
    out = local_attention(torch.zeros_like(query), key, value, 7)
    padded = F.pad(value.flatten(1, 2), [3] * 4, mode='reflect')
    kernel = torch.full((12, 1, 7, 7), 1 / 49, dtype=torch.float64)
    torch.testing.assert_close(out.flatten(1, 2), F.conv2d(padded, kernel, groups=12))


def test_local_attention_with_frozen_logits_is_a_depthwise_convolution():
    """A key says which residues modulo the window its position has; of each there is one in a
    neighbourhood, so that a query can name the logit of each offset, whatever the image."""
    height, width, heads = 12, 13, 2
    logits = torch.randn(heads, 7, 7, dtype=torch.float64)
    y, x = torch.arange(height), torch.arange(width)
    residue = 7 * (y % 7)[:, None] + x % 7
    key = F.one_hot(residue, 49).permute(2, 0, 1).double()
    offsets = torch.arange(-3, 4)
    rows, cols = ((n[:, None] + offsets) % 7 for n in (y, x))
    index = 7 * rows[:, None, :, None] + cols[:, None]  # (H, W, 7, 7)
    query = torch.zeros(heads, height, width, 49, dtype=torch.float64)
    query.scatter_(3, index.flatten(2).expand(heads, -1, -1, -1),
                   logits.flatten(1)[:, None, None].expand(-1, height, width, -1))  # fmt: skip
    query = query.permute(0, 3, 1, 2)[None]
    value = torch.randn(1, heads, 49, height, width, dtype=torch.float64)
    out = local_attention(query, key.expand_as(value), value, 7, scale=1.0)
    kernel = logits.flatten(1).softmax(1).view(heads, 1, 7, 7).repeat_interleave(49, 0)
    expected = F.conv2d(value.flatten(1, 2), kernel, groups=heads * 49)
    # Away from the border, where attention reflects.
    torch.testing.assert_close(out.flatten(1, 2)[..., 3:-3, 3:-3], expected)


def frozen_window_attention(channels: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """One head a channel, zero queries, values as they are: the position bias alone is the logit.

    Also returns it by offset, from a query to a key: (C, 13, 13).
    """
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    module = swin.ShiftWindowMSA(channels, channels, 7).double().eval()
    attention = module.w_msa
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    nn.init.eye_(attention.proj.weight)
    nn.init.eye_(attention.qkv.weight[2 * channels :])
    nn.init.normal_(attention.relative_position_bias_table)
    # Row of the table: 13 * (row of query - row of key + 6) + column likewise.
    logits = attention.relative_position_bias_table.detach().T.view(channels, 13, 13).flip(1, 2)
    return module, logits


@pytest.mark.parametrize('operator', ['mmdet', 'acmix'])
def test_window_attention_with_frozen_logits_is_a_depthwise_convolution(operator):
    """Of each window, with zeros outside; softmax divides by the same convolution of ones."""
    channels, grid = 5, (2, 3)
    module, logits = frozen_window_attention(channels)
    x = torch.randn(2, channels, 7 * grid[0], 7 * grid[1], dtype=torch.float64)
    tokens = x.permute(0, 2, 3, 1)
    if operator == 'mmdet':
        out = module(tokens.flatten(1, 2), x.shape[-2:]).view(tokens.shape)
    else:
        out = WindowACmix(module.w_msa, mix='attention').double()(tokens)
    out = out.permute(0, 3, 1, 2)

    def windows(maps):
        maps = maps.unflatten(3, (grid[1], 7)).unflatten(2, (grid[0], 7))
        return maps.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    kernel = logits.exp()[:, None]
    sums, norms = (
        F.conv2d(maps, kernel, padding=6, groups=channels)
        for maps in (windows(x), torch.ones(1, channels, 7, 7, dtype=torch.float64))
    )
    torch.testing.assert_close(windows(out), sums / norms)
    # The middle of a window has all of a 7x7 neighbourhood in it: a plain 7x7 convolution.
    kernel = logits[:, 3:10, 3:10].flatten(1).softmax(1).view(channels, 1, 7, 7)
    expected = F.conv2d(x, kernel, stride=7, groups=channels)
    torch.testing.assert_close(out[:, :, 3::7, 3::7], expected)
