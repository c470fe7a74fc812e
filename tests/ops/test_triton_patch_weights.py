"""Triton's patch weights, interpreted where there is no GPU: small maps."""

import copy

import pytest
import torch
from devices import device_of, needs_triton
from torch import nn

from acmix_mm.ops import patch_weights
from acmix_mm.ops import reference as oracles

pytestmark = needs_triton

HALF, BFLOAT, SINGLE = torch.float16, torch.bfloat16, torch.float32


def contiguous(maps):
    return maps


def channels_last(maps):
    return maps.contiguous(memory_format=torch.channels_last)


def make(channels, outputs, size, kernel_size, stride=1, dtype=SINGLE):
    """Query, key, weight and a norm in evaluation mode."""
    inputs = channels * (1 + kernel_size**2)
    out = [-(-n // stride) for n in size]
    shapes = (2, channels, *out), (2, channels, *size), (outputs, inputs, 1, 1)
    norm = nn.BatchNorm2d(inputs).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    device = device_of('triton')
    return [torch.randn(s).to(device, dtype) for s in shapes], norm.to(device, dtype)


def exact(query, key, weight, norm, *geometry):
    norm = copy.deepcopy(norm).cpu().double()
    return oracles.patch_weights(query.cpu(), key.cpu(), weight.cpu(), norm, *geometry)


# Channels, outputs, size, kernel_size: several tiles, more channels and outputs than a product has.
@pytest.mark.parametrize(
    ('layout', 'dtype', 'shape', 'stride', 'dilation', 'training'),
    [
        (contiguous, SINGLE, (4, 2, (9, 10), 3), 1, 1, True),
        (contiguous, HALF, (2, 3, (5, 6), 3), 2, 3, False),
        (contiguous, BFLOAT, (2, 9, (2, 3), 5), 3, 1, False),
        (channels_last, SINGLE, (33, 17, (3, 2), 3), 1, 2, False),
        (channels_last, SINGLE, (2, 3, (6, 5), 3), 2, 1, True),
        (channels_last, HALF, (16, 8, (5, 6), 3), 1, 1, True),
        (channels_last, BFLOAT, (3, 2, (1, 9), 1), 2, 1, False),
    ],
)
def test_equals_the_definition(layout, dtype, shape, stride, dilation, training):
    """Result and gradients, those of the norm included, and running statistics."""
    tensors, norm = make(*shape, stride, dtype)
    norm.float().train(training)
    double = copy.deepcopy(norm).cpu().double()
    right = [t.cpu().double().requires_grad_() for t in tensors]
    query, key, weight = tensors
    leaves = [t.requires_grad_() for t in (layout(query), layout(key), weight)]
    geometry = (shape[-1], stride, dilation)
    out = patch_weights(*leaves, norm, *geometry, 'triton')
    expected = oracles.patch_weights(*right, double, *geometry)
    assert out.dtype == dtype
    assert out.stride() == layout(torch.empty_like(out)).stride()
    for name, buffer in double.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name).cpu().double(), buffer.double())
    grad = torch.randn(expected.shape).to(out)
    ours = torch.autograd.grad(out, [*leaves, *norm.parameters()], grad)
    theirs = torch.autograd.grad(expected, [*right, *double.parameters()], grad.cpu().double())
    for result, oracle in zip((out, *ours), (expected, *theirs), strict=True):
        # Of a batch's statistics, gradients are small differences of large sums.
        summands = norm.num_features * (100 if training else 1)
        allowed = oracles.tolerance(dtype, summands, oracle.abs().max().item())
        torch.testing.assert_close(result.cpu().double(), oracle, rtol=0, atol=allowed)


@torch.no_grad()
def test_more_outputs_than_a_product_has():
    (query, key, weight), norm = make(1, 65, (2, 3), 3)
    out = patch_weights(query, key, weight, norm, 3, backend='triton')
    expected = exact(query, key, weight, norm, 3, 1, 1)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_parameters_of_the_norm_and_under_autocast():
    (query, key, weight), norm = make(2, 3, (4, 5), 3)
    norm.weight = norm.bias = None
    expected = exact(query, key, weight, norm, 3, 1, 1)
    with torch.autocast(device_of('triton'), torch.bfloat16):
        out = patch_weights(query, key, weight, norm, 3, backend='triton')
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.cpu().double(), expected, rtol=2**-7, atol=2**-7)


@torch.no_grad()
def test_other_pixels_do_not_leak():
    """A NaN reaches those whose patch it lies in, though a ReLU comes after it."""
    (query, key, weight), norm = make(2, 3, (6, 7), 3)
    key[0, 1, 2, 5] = torch.nan
    query[0, 0, 5, 0] = torch.inf
    out = patch_weights(query, key, weight, norm, 3, backend='triton')
    expected = exact(query, key, weight, norm, 3, 1, 1)
    assert torch.equal(out.isfinite().cpu(), expected.isfinite())


@pytest.mark.parametrize(('outputs', 'taken'), [(64, 2), (65, 1)])
def test_training_with_few_outputs(outputs, taken, monkeypatch):
    """With more, it runs in PyTorch's operations; inference does not."""
    from acmix_mm.ops.backends import triton_patch_weights

    kernel, calls = triton_patch_weights.patch_weights, []
    monkeypatch.setattr(
        triton_patch_weights, 'patch_weights', lambda *a: calls.append(a) or kernel(*a)
    )
    (query, key, weight), norm = make(1, outputs, (1, 2), 3)
    with torch.no_grad():
        plain = patch_weights(query, key, weight, norm, 3, backend='triton')
    out = patch_weights(query.requires_grad_(), key, weight, norm, 3, backend='triton')
    assert len(calls) == taken
    torch.testing.assert_close(out, plain)


def test_refuses_derivatives_of_gradients():
    (query, key, weight), norm = make(1, 2, (2, 3), 3)
    out = patch_weights(query.requires_grad_(), key, weight, norm, 3, backend='triton')
    (gradient,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match='patch_weights has no second-order gradients'):
        gradient.sum().backward()


def test_empty_batch():
    (query, key, weight), norm = make(1, 2, (2, 3), 3)
    leaves = [query.requires_grad_(), weight.requires_grad_()]
    out = patch_weights(query[:0], key[:0], weight, norm, 3, backend='triton')
    assert out.shape == (0, 2, 2, 3)
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize('layout', [contiguous, channels_last])
def test_opcheck(layout):
    """Schema, fake kernels and autograd registration, as torch.compile needs them."""
    query, padded = (layout(torch.randn(1, 2, *s)) for s in ((3, 4), (5, 6)))
    vectors = (torch.randn(20) for _ in range(3))
    arguments = [query, padded, *vectors, torch.randn(20, 4)]
    arguments = (*(t.to(device_of('triton')).requires_grad_() for t in arguments), 3, 1, 1)
    tests = ('test_schema', 'test_autograd_registration', 'test_faketensor')
    operators = torch.ops.acmix_mm
    torch.library.opcheck(operators.patch_weights_triton.default, arguments, test_utils=tests)
    grad = layout(torch.randn(1, 4, 3, 4)).to(device_of('triton'))
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    operator = operators.patch_weights_triton_backward.default
    torch.library.opcheck(operator, (grad, *arguments), test_utils=tests)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({0: torch.ones(1, 2, 5, 5)}, r'query must have shape \(1, 2, 5, 6\)'),
        ({1: torch.ones(1, 2, 7, 8).half()}, 'query and padded must have one dtype'),
        ({1: torch.ones(2, 7, 8)}, 'query and padded must have shapes'),
        ({2: torch.ones(18)}, r'mean must have shape \(20,\)'),
        ({4: torch.ones(1, 20)}, r'shift must have shape \(20,\)'),
        ({5: torch.ones(18, 4)}, r'weight must have shape \(20, O\)'),
        ({6: 9}, 'query must have shape'),
        ({7: 0}, 'stride must be a positive integer'),
        ({8: 2**40}, 'dilation must be at most'),
        ({8: 2**31 - 1}, 'query must have shape'),
    ],
)
def test_hostile_calls(changes, message):
    """Kernels on a GPU read where they are told to."""
    maps = torch.ones(1, 2, 5, 6), torch.ones(1, 2, 7, 8)
    arguments = [*maps, *torch.ones(3, 20), torch.ones(20, 4), 3, 1, 1]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.acmix_mm.patch_weights_triton(*arguments)


def test_hostile_gradients():
    maps = torch.ones(1, 2, 5, 6), torch.ones(1, 2, 7, 8)
    backward = torch.ops.acmix_mm.patch_weights_triton_backward
    vectors = torch.ones(3, 20)
    with pytest.raises(ValueError, match=r'grad must have shape \(1, 4, 5, 6\)'):
        backward(torch.ones(1, 4, 5, 5), *maps, *vectors, torch.ones(20, 4), 3, 1, 1)
    with pytest.raises(ValueError, match='weight must have at most 64 outputs, got 65'):
        backward(torch.ones(1, 65, 5, 6), *maps, *vectors, torch.ones(20, 65), 3, 1, 1)
