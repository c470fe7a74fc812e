"""Triton's patch weights, for inference, interpreted where there is no GPU: small maps."""

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
    ('layout', 'dtype', 'shape', 'stride', 'dilation'),
    [
        (contiguous, SINGLE, (4, 2, (9, 10), 3), 1, 1),
        (contiguous, HALF, (2, 3, (5, 6), 3), 2, 3),
        (contiguous, BFLOAT, (2, 9, (2, 3), 5), 3, 1),
        (channels_last, SINGLE, (33, 65, (3, 2), 3), 1, 2),
        (channels_last, HALF, (16, 8, (5, 6), 3), 1, 1),
        (channels_last, BFLOAT, (3, 2, (1, 9), 1), 2, 1),
    ],
)
@torch.no_grad()
def test_equals_the_definition(layout, dtype, shape, stride, dilation):
    (query, key, weight), norm = make(*shape, stride, dtype)
    geometry = (shape[-1], stride, dilation)
    out = patch_weights(layout(query), layout(key), weight, norm, *geometry, 'triton')
    expected = exact(query, key, weight, norm, *geometry)
    assert out.dtype == dtype
    assert out.stride() == layout(torch.empty_like(out)).stride()
    allowed = oracles.tolerance(dtype, norm.num_features, expected.abs().max().item())
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=allowed)


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


def test_gradients_and_training_are_pytorchs(monkeypatch):
    from acmix_mm.ops.backends import triton_patch_weights

    kernel, calls = triton_patch_weights.patch_weights, []
    monkeypatch.setattr(
        triton_patch_weights, 'patch_weights', lambda *a: calls.append(a) or kernel(*a)
    )
    (query, key, weight), norm = make(2, 3, (4, 5), 3)
    with torch.no_grad():
        plain = patch_weights(query, key, weight, norm, 3, backend='triton')
    assert len(calls) == 1
    out = patch_weights(query.requires_grad_(), key, weight, norm, 3, backend='triton')
    torch.testing.assert_close(out, plain)
    (gradient,) = torch.autograd.grad(out.sum(), query)
    assert gradient.any()
    with torch.no_grad():
        patch_weights(query, key, weight, norm.train(), 3, backend='triton')
    assert norm.num_batches_tracked == 1
    assert len(calls) == 1


@pytest.mark.parametrize('layout', [contiguous, channels_last])
def test_opcheck(layout):
    """Schema and fake kernel, as torch.compile needs them."""
    query, padded = (layout(torch.randn(1, 2, *s)) for s in ((3, 4), (5, 6)))
    vectors = (torch.randn(20) for _ in range(3))
    arguments = [query, padded, *vectors, torch.randn(20, 4)]
    arguments = (*(t.to(device_of('triton')) for t in arguments), 3, 1, 1)
    tests = ('test_schema', 'test_faketensor')
    operator = torch.ops.acmix_mm.patch_weights_triton.default
    torch.library.opcheck(operator, arguments, test_utils=tests)


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
