"""PyTorch's counter on our operators: closed forms, other backends, and naive computations."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from devices import device_of, needs_native, operators_on_tensors
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from acmix_mm.layers import (
    ACmix,
    PatchACmix,
    PatchAttention,
    SpatialReductionACmix,
    WindowACmix,
    XVolution,
)
from acmix_mm.ops import (
    available_backends,
    fused_acmix,
    group_conv,
    local_aggregation,
    local_attention,
    patch_weights,
)

BACKENDS = available_backends()
# Batch, heads, head dimension, height, width; all different.
B, N, D, H, W = 2, 3, 4, 5, 7
C = N * D


def count(function, *leaves) -> tuple[int, int]:
    """FLOPs of the forward pass without gradients, and of forward and backward pass."""
    counts = []
    for train in (False, True):
        leaves = [leaf.detach().requires_grad_(train) for leaf in leaves]
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            out = function(*leaves)
            if train:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    return tuple(counts)


@pytest.fixture
def fake():
    """Operators tell shapes and compute nothing: Triton's interpreter is slow."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def neighbourhoods(maps, kernel_size, stride, dilation):
    """(B, C, H, W) -> (B, C, k * k, pixels); counters do not care what is beyond the border."""
    padding = kernel_size // 2 * dilation
    columns = F.unfold(maps, kernel_size, dilation, padding, stride)
    return columns.unflatten(1, (maps.size(1), -1))


def test_every_operator_has_a_formula():
    names = operators_on_tensors()
    assert len(names) > 3
    known = {getattr(operator, '_qualified_op_name', None) for operator in flop_registry}
    assert names <= known


@pytest.mark.usefixtures('fake')
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 3)])
def test_local_attention(backend, stride, dilation):
    key = torch.randn(B, N, D, H, W, device=device_of(backend))
    tensors = (key[..., ::stride, ::stride], key, key)
    product = 2 * 9 * B * C * math.ceil(H / stride) * math.ceil(W / stride)
    got = count(lambda *t: local_attention(*t, 3, stride, dilation, backend=backend), *tensors)
    # Logits and sum of values; backward: logits again, gradients of weights, query, key, value.
    assert got == (2 * product, 7 * product)

    def unfolded(query, key, value):
        query = query.flatten(3).permute(0, 1, 3, 2).flatten(0, 2)[:, None]
        key, value = (
            neighbourhoods(t.flatten(1, 2), 3, stride, dilation)
            .unflatten(1, (N, D))
            .permute(0, 1, 4, 2, 3)
            .flatten(0, 2)
            for t in (key, value)
        )
        return torch.bmm(torch.bmm(query, key).softmax(-1), value.mT)

    # It keeps the weights where ours takes the logits again.
    assert count(unfolded, *tensors) == (got[0], got[1] - product)


@pytest.mark.parametrize(
    ('needed', 'products'),
    [
        ((True, True, True), 5),
        ((False, False, True), 2),  # logits, gradient of value
        ((True, False, False), 3),  # logits, gradients of weights and query
        ((False, True, True), 4),
    ],
)
def test_needed_gradients_of_attention(needed, products):
    shape = (B, N, D, H, W)
    formula = flop_registry[torch.ops.acmix_mm.local_attention_torch_backward]
    arguments = (shape, shape, shape, shape, 3, 1, 1, 0.5, needed)
    assert formula(*arguments, out_val=(shape,) * 3) == 2 * products * 9 * B * C * H * W


@pytest.mark.usefixtures('fake')
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('groups', 'stride', 'dilation'), [(1, 1, 1), (D, 2, 3)])
def test_group_conv(backend, groups, stride, dilation):
    inputs = 3 * N
    maps, weight = torch.randn(B, groups, inputs, H, W), torch.randn(C, inputs, 3, 3)
    flops = 2 * 9 * inputs * B * C * math.ceil(H / stride) * math.ceil(W / stride)
    maps, weight = maps.to(device_of(backend)), weight.to(device_of(backend))
    got = count(lambda *t: group_conv(*t, stride, dilation, backend=backend), maps, weight)
    # PyTorch's own formula counts the gradient of the weight as if each group had all channels.
    gradients = 1 + groups if backend == 'torch' else 2
    assert got == (flops, (1 + gradients) * flops)
    got = count(lambda t: group_conv(t, weight, stride, dilation, backend=backend), maps)
    assert got == (flops, 2 * flops)


def acmix_arguments():
    """Of fused_acmix, at stride 2 with 5 input channels; FLOPs of its three parts."""
    tensors = (
        torch.randn(B, 5, H, W),
        torch.randn(3 * C, 5, 1, 1),
        torch.randn(3 * C),
        torch.randn(D, 2),
        torch.randn(C, 3 * N, 3, 3),
        torch.randn(C),
        torch.randn(1),
    )
    pixels = B * math.ceil(H / 2) * math.ceil(W / 2)
    parts = (2 * 3 * C * 5 * B * H * W, 4 * 49 * C * pixels, 2 * 9 * 3 * N * C * pixels)
    return tensors, (N, 7, 2), parts


@needs_native
def test_fused_acmix():
    tensors, geometry, (projection, attention, convolution) = acmix_arguments()
    forward = projection + attention + convolution
    # Attention's five products to the two of its forward pass; the projection is taken anew.
    backward = 3 * projection + attention * 5 // 2 + 2 * convolution
    assert count(lambda *t: fused_acmix(*t, *geometry), *tensors) == (forward, forward + backward)


@needs_native
@pytest.mark.parametrize('channels', [1, C])
def test_masks_of_fused_acmix(channels):
    tensors, geometry, (projection, attention, convolution) = acmix_arguments()
    shapes = [t.shape for t in tensors]
    grad = (B, C, math.ceil(H / 2), math.ceil(W / 2))
    formula = flop_registry[torch.ops.acmix_mm.fused_acmix_backward]

    def flops(*needed: str) -> int:
        names = ('x', 'weight', 'bias', 'slopes', 'kernel', 'scale')
        mask = [name in needed for name in names]
        arguments = (grad, grad, *shapes[:5], (channels,), *geometry, 1, mask)
        return formula(*arguments, out_val=None)

    backward = attention * 5 // 2
    maps = projection + backward + convolution
    assert flops('bias') == maps
    assert flops('x', 'weight') == maps + 2 * projection
    assert flops('kernel') == projection + convolution
    assert flops('slopes') == projection + backward
    # A scale a channel needs the attention's result.
    assert flops('scale') == projection + (backward if channels == 1 else attention)


@pytest.mark.usefixtures('fake')
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 3)])
def test_local_aggregation(stride, dilation, backend):
    size = (math.ceil(H / stride), math.ceil(W / stride))
    shapes = (B, C, H, W), (B, N, 9, *size)
    value, weight = (torch.randn(s, device=device_of(backend)) for s in shapes)
    product = 2 * 9 * B * C * math.prod(size)
    got = count(
        lambda *t: local_aggregation(*t, 3, stride, dilation, backend=backend), value, weight
    )
    assert got == (product, 3 * product)

    def unfolded(value, weight):
        values = neighbourhoods(value, 3, stride, dilation).unflatten(1, (D, N))
        weight = weight.flatten(3)[:, None].expand_as(values)
        values, weight = (t.transpose(3, 4).flatten(0, 3) for t in (values, weight))
        return torch.bmm(values[:, None], weight[..., None])

    assert count(unfolded, value, weight) == got


@pytest.mark.usefixtures('fake')
@pytest.mark.parametrize('backend', BACKENDS)
def test_patch_weights(backend):
    inputs, outputs = D * 10, 6
    query, key = torch.randn(B, D, 3, 4), torch.randn(B, D, H, W)
    weight, norm = torch.randn(outputs, inputs, 1, 1), nn.BatchNorm2d(inputs).eval()
    function = partial(patch_weights, norm=norm, kernel_size=3, stride=2, backend=backend)
    forward, both = count(function, query, key, weight)
    product = 2 * inputs * outputs * B * 3 * 4
    assert forward == product
    assert both == 3 * product


def test_attention_of_pytorch_on_the_cpu():
    """Its kernel for the CPU has no formula in PyTorch; with it the counts are those of others."""
    query, key = torch.randn(B, N, 5, D), torch.randn(B, N, 7, D)
    product = 2 * B * N * 5 * 7 * D
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = count(F.scaled_dot_product_attention, query, key, key)
    assert got == (2 * product, 7 * product)


def window_acmix(backend: str, **options) -> nn.Module:
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    plain = swin.WindowMSA(embed_dims=8, num_heads=2, window_size=(2, 3))
    plain.init_weights()
    return WindowACmix(plain, backend=backend, **options)


def spatial_reduction_acmix(backend: str, **options) -> nn.Module:
    pvt = pytest.importorskip('mmdet.models.backbones.pvt')
    plain = pvt.SpatialReductionAttention(embed_dims=8, num_heads=2, sr_ratio=2)
    layer = SpatialReductionACmix(plain, backend=backend, **options)
    forward = layer.forward
    layer.forward = lambda x: forward(x, (4, 6))
    return layer


def acmix(backend: str, **options) -> nn.Module:
    return ACmix(8, 8, num_heads=2, attn_kernel_size=3, backend=backend, **options)


def acmix_of_many_heads(backend: str, **options) -> nn.Module:
    return ACmix(8, 8, num_heads=8, stride=2, backend=backend, **options)


def patch_acmix(backend: str, **options) -> nn.Module:
    return PatchACmix(32, 8, 2, 3, backend=backend, **options)


MIXED = {
    'ACmix': (acmix, (8, 4, 6)),
    'ACmix, many heads': (acmix_of_many_heads, (8, 4, 6)),
    'PatchACmix': (patch_acmix, (32, 4, 6)),
    'WindowACmix': (window_acmix, (4, 6, 8)),
    'SpatialReductionACmix': (spatial_reduction_acmix, (24, 8)),
}
OPTIONS = {
    'tensor shifts': {'shift': 'tensor'},
    'fixed kernels': {'shift': 'fixed'},
    'one kernel group': {'kernel_groups': 1},
}
LAYERS = {
    **MIXED,
    **{
        f'{name}, {form}': (partial(make, **options), shape)
        for name, (make, shape) in MIXED.items()
        for form, options in OPTIONS.items()
    },
    'PatchAttention': (lambda b: PatchAttention(32, 8, 2, 3, b), (32, 4, 6)),
    'XVolution': (
        lambda b: XVolution(8, 8, attention='local', num_heads=2, attn_kernel_size=3, backend=b),
        (8, 4, 6),
    ),
}


@pytest.mark.usefixtures('fake')
@pytest.mark.parametrize('name', LAYERS)
def test_backends_count_the_same(name):
    """Forward, in evaluation mode."""
    build, shape = LAYERS[name]
    counts = {}
    for backend in BACKENDS:
        with torch.device(device_of(backend)):
            layer, x = build(backend).eval(), torch.randn(B, *shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x)
        counts[backend] = counter.get_total_flops()
        fused = isinstance(layer, ACmix) and layer._fuses and layer.mixing_weights().fc is None
        if fused and backend == 'triton':
            # It projects for each of the paths: 8 channels to 24 of 4 x 6 pixels once more.
            counts[backend] -= 2 * 8 * 24 * 4 * 6 * B
    assert counts['torch'] > 0
    assert set(counts.values()) == {counts['torch']}, counts


@pytest.mark.parametrize('backend', [b for b in BACKENDS if b != 'triton'])
@pytest.mark.parametrize(
    ('heads', 'options', 'convolution'),
    [
        # Multiplications of an output pixel for each head position, at 3 x 3 and stride 1. Few
        # heads: fc is in the kernels, of which the operator of both paths has one an output.
        (2, {}, 9 * 6 * 2),
        (2, {'shift': 'fixed'}, 9 * 6 * 2),
        (2, {'kernel_groups': 1}, 9 * 6 * 2),
        (2, {'kernel_groups': 1, 'mix': 'conv'}, 9 * 6),
        # Eight heads: fc, then as many kernels as there are; one of them is folded.
        (8, {}, 9 * 24 + 81 * 8),
        (8, {'kernel_groups': 4}, 9 * 24 + 81 * 4),
        (8, {'kernel_groups': 1}, 9 * 24),
        (8, {'shift': 'fixed'}, 9 * 24),
        # Sums of tensors are not counted, as no additions are.
        (2, {'shift': 'tensor'}, 9 * 6),
        (8, {'shift': 'tensor'}, 9 * 24),
    ],
)
def test_forms_of_the_convolution_path(backend, heads, options, convolution):
    channels, pixels = 16, B * H * W
    dim = channels // heads
    layer = ACmix(8, channels, num_heads=heads, attn_kernel_size=5, backend=backend, **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(B, 8, H, W))
    attention = 2 * 25 * channels if layer.with_attention else 0
    expected = 3 * 8 * channels * pixels + attention * pixels + convolution * dim * pixels
    kernels = dim * layer.kernel_groups
    folding = 81 * 3 * heads * kernels if layer.folds else 0  # of weights
    assert counter.get_total_flops() == 2 * (expected + folding)


@needs_native
@pytest.mark.parametrize('name', ['ACmix', 'PatchACmix', 'XVolution'])
def test_backends_count_the_same_in_training(name):
    """Forward and backward pass, up to what is said below."""
    build, shape = LAYERS[name]
    counts = {}
    for backend in ('torch', 'native'):
        layer, x = build(backend), torch.randn(B, *shape)
        with FlopCounterMode(display=False) as counter:
            layer(x.requires_grad_()).sum().backward()
        counts[backend] = counter.get_total_flops()
    if name == 'ACmix':  # the fused operator projects anew
        counts['torch'] += 2 * 3 * 8 * x.numel()
    if name != 'XVolution':
        # PyTorch's formula for the gradient of a grouped convolution's weight, see above.
        counts['torch'] -= (layer.head_dim - 1) * 2 * 9 * 6 * 8 * B * 4 * 6
    if name == 'PatchACmix':
        # Statistics are products of key and its square, 2 maps padded to 6x8, with windows, 3 of
        # rows and of columns: forward, anew, and backward.
        counts['torch'] += 3 * 2 * 2 * B * 2 * 6 * 3 * (8 + 3)
    assert counts['native'] == counts['torch']
