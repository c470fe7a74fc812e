"""Triton's attention with position encoding and sum of both paths inside, as the layer has it."""

import math

import pytest
import torch
from devices import device_of, needs_triton
from torch import nn

from acmix_mm.layers import ACmix
from acmix_mm.ops import reference as oracles
from acmix_mm.ops.backends import triton_backend

pytestmark = needs_triton
DEVICE = device_of('triton')
NAMES = ('query', 'key', 'value', 'slopes', 'convolution', 'factor')
# As of attention alone, of the error, relative to the value plus the largest. (Triton's interpreter
# truncates to bfloat16 where a GPU rounds.)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-10}


def inputs(shape, stride, dtype=torch.float32, factors=1, channels_last=False):
    torch.manual_seed(0)
    batch, heads, dim, height, width = shape
    queries = (batch, heads, dim, -(-height // stride), -(-width // stride))
    maps = [torch.randn(s, dtype=torch.float64) for s in (queries, shape, shape, queries)]
    if channels_last:
        maps = [t.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2) for t in maps]
    query, key, value, convolution = (t.to(DEVICE, dtype) for t in maps)
    # Parameters stay in float32 where a layer computes in half precision.
    slopes, factor = torch.randn(dim, 2).to(DEVICE), torch.randn(factors).to(DEVICE)
    return [t.requires_grad_() for t in (query, key, value, slopes, convolution, factor)]


def exact(tensors, *geometry):
    """In float64, of the formula."""
    query, key, value, slopes, convolution, factor = (t.double() for t in tensors)
    height, width = key.shape[3:]
    x, y = (
        torch.linspace(-1, 1, n, dtype=torch.float64, device=key.device) for n in (width, height)
    )
    position = slopes[:, :1, None] * x + slopes[:, 1:, None] * y[:, None]
    attention = oracles.local_attention(query, key - position, value, *geometry)
    shape = (1, 1, 1) if factor.numel() == 1 else (*query.shape[1:3], 1, 1)
    return factor.view(shape) * attention + convolution


def assert_agrees(tensors, *geometry):
    """Result and gradients of all tensors."""
    out = triton_backend.mixed_attention(*tensors, *geometry)
    expected = exact(tensors, *geometry)
    assert out.dtype == tensors[0].dtype
    grad = torch.randn_like(out)
    results = (out, *torch.autograd.grad(out, tensors, grad))
    oracle = (expected, *torch.autograd.grad(expected, tensors, grad.double()))
    for name, ours, right in zip(('output', *NAMES), results, oracle, strict=True):
        finite = right.isfinite()
        assert torch.equal(ours.isfinite(), finite), name
        ours, right = (t.detach().double().where(finite, 0) for t in (ours, right))
        tolerance = TOLERANCE[out.dtype]
        if name == 'slopes':  # a sum of rounded numbers, of all pixels
            tolerance *= max(1, tensors[1][:, :, 0].numel() / 16) ** 0.5
        atol = tolerance * max(1, right.abs().max().item())
        torch.testing.assert_close(
            ours, right, rtol=tolerance, atol=atol, msg=lambda text, name=name: f'{name}: {text}'
        )


@pytest.mark.parametrize(
    ('shape', 'geometry', 'factors', 'dtype', 'channels_last'),
    [
        ((1, 2, 4, 7, 6), (5, 1, 1), 1, torch.float32, False),
        ((1, 2, 4, 7, 6), (5, 1, 1), 1, torch.bfloat16, True),
        ((1, 2, 3, 6, 9), (3, 2, 1), 6, torch.float32, True),
        ((1, 2, 3, 6, 9), (3, 2, 1), 6, torch.float16, False),
        ((2, 1, 16, 4, 5), (3, 1, 2), 1, torch.float16, True),
        ((2, 1, 16, 4, 5), (3, 1, 2), 1, torch.bfloat16, False),
        ((1, 1, 4, 1, 6), (3, 3, 2), 4, torch.float32, True),
    ],
)
def test_equals_the_formula(shape, geometry, factors, dtype, channels_last):
    assert_agrees(inputs(shape, geometry[1], dtype, factors, channels_last), *geometry)


@pytest.mark.parametrize(
    ('needed', 'factors'),
    [
        (('query',), 1),
        (('key',), 1),
        (('value',), 6),
        (('slopes',), 1),
        (('convolution',), 1),
        (('factor',), 1),
        (('factor',), 6),
        (('slopes', 'convolution', 'factor'), 1),
    ],
)
def test_gradients_of_some_inputs(needed, factors):
    tensors = inputs((1, 2, 3, 3, 4), 1, factors=factors)
    leaves = []
    for name, tensor in zip(NAMES, tensors, strict=True):
        tensor.requires_grad_(name in needed)
        leaves += [tensor] if name in needed else []
    out = triton_backend.mixed_attention(*tensors, 3, 1, 1)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(exact(tensors, 3, 1, 1), leaves, grad.double())
    for ours, right in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['query', 'key', 'value', 'convolution'])
@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # of Triton's interpreter
def test_infinities_stay_within_neighbourhoods(name):
    tensors = inputs((1, 1, 3, 6, 7), 1)
    with torch.no_grad():
        tensors[NAMES.index(name)][..., 1, 0, 0] = math.inf
    assert_agrees(tensors, 3, 1, 1)


def test_empty_batch():
    tensors = inputs((0, 2, 3, 4, 5), 1)
    out = triton_backend.mixed_attention(*tensors, 3, 1, 1)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == (0, 2, 3, 4, 5)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize('grad', [False, True])
def test_attention_is_a_map_in_memory_for_gradients_only(grad):
    """And the keys less their encoding never are: the layer's, as they come, are what is read."""
    forward = torch.ops.acmix_mm.local_attention_triton_forward.default
    made = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            if func is forward:
                made.extend(t.numel() for t in results)
            return results

    tensors = [t.requires_grad_(grad) for t in inputs((1, 2, 3, 4, 5), 1)]
    with Record():
        triton_backend.mixed_attention(*tensors, 3, 1, 1)
    maps = tensors[0].numel()
    assert made == ([maps, maps, maps // 3] if grad else [maps, 0, 0])


def test_layer_leaves_position_and_sum_to_the_kernel():
    """No operation on maps but projections, convolution and the one kernel."""
    layer = ACmix(8, 8, num_heads=2, attn_kernel_size=3, backend='triton')
    nn.init.normal_(layer.dep_conv['weight'])
    x = torch.randn(1, 8, 5, 6).to(DEVICE).contiguous(memory_format=torch.channels_last)
    pixels, seen = 30, []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            # Weights have up to 3 x 3 numbers.
            maps = getattr(results, 'dim', int)() >= 4 and math.prod(results.shape[-2:]) == pixels
            if maps and not func.is_view:
                seen.append(func.overloadpacket._qualified_op_name)
            return results

    with Record(), torch.no_grad():
        layer.to(DEVICE)(x)
    assert set(seen) == {'aten::convolution', 'acmix_mm::group_conv_triton'}


@pytest.mark.slow
@pytest.mark.parametrize('factors', [1, 6])
def test_opcheck(factors):
    tensors = inputs((1, 2, 3, 4, 5), 2, factors=factors)
    geometry = (3, 2, 1, 0.5)
    forward = torch.ops.acmix_mm.local_attention_triton_forward.default
    backward = torch.ops.acmix_mm.local_attention_triton_backward.default
    torch.library.opcheck(forward, (*tensors, *geometry, True))
    query, key, value, slopes, convolution, factor = (t.detach() for t in tensors)
    _, attention, lse = forward(query, key, value, slopes, convolution, factor, *geometry, True)
    given = (query, key, value, slopes, factor, attention, lse, *geometry, [True] * 5)
    torch.library.opcheck(backward, (convolution, *given))
