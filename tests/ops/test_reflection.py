"""Maps smaller than what is padded by reflection: a pixel is in hundreds of places."""

import pytest
import torch
from devices import needs_native

from acmix_mm.ops import local_aggregation
from acmix_mm.ops._reflection import reflect_pad

half_precision = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
small_maps = pytest.mark.parametrize('size', [(1, 1), (1, 6), (3, 2), (40, 60)], ids=str)


def gradients(function, maps, grad):
    """A function's gradients of the maps, in their dtype and in float64."""
    pair = []
    for dtype in (maps.dtype, torch.float64):
        leaf = maps.to(dtype).requires_grad_()
        out = function(leaf)
        assert out.shape == grad.shape
        pair += torch.autograd.grad(out, leaf, grad.to(out.dtype))
    return pair


def assert_rounded_once(result, exact):
    """Sums that cancel have no larger error than others: float32's is far below the last bit."""
    torch.testing.assert_close(
        result.double(), exact, rtol=torch.finfo(result.dtype).eps, atol=1e-5
    )


@half_precision
@small_maps
def test_gradient_of_padding(size, dtype):
    maps = torch.zeros(8, 3, *size, dtype=dtype)
    grad = torch.randn(8, 3, *(n + 80 for n in size)).to(dtype)
    assert_rounded_once(*gradients(lambda m: reflect_pad(m, 40), maps, grad))


@half_precision
@small_maps
@pytest.mark.parametrize('backend', ['torch', pytest.param('native', marks=needs_native)])
def test_gradient_of_aggregated_values(backend, size, dtype):
    weight = torch.randn(8, 1, 81, *size).to(dtype)
    grad = torch.randn(8, 3, *size).to(dtype)

    def function(value):
        return local_aggregation(value, weight.to(value.dtype), 9, dilation=20, backend=backend)

    assert_rounded_once(*gradients(function, torch.zeros(8, 3, *size, dtype=dtype), grad))
