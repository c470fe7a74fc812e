"""Padding by reflection, where a map is smaller than what is padded."""

import pytest
import torch

from acmix_mm.ops._reflection import reflect_pad


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', [(1, 1), (1, 6), (3, 2), (40, 60)], ids=str)
def test_gradient_is_rounded_once(size, dtype):
    """A pixel that is reflected to hundreds of places gets their sum as no sum in its dtype is."""
    maps = torch.zeros(1, 1, *size, dtype=dtype, requires_grad=True)
    exact = maps.detach().double().requires_grad_()
    padded = reflect_pad(maps, 40)
    grad = torch.rand(padded.shape, dtype=torch.float64).to(dtype)  # nothing cancels
    (result,) = torch.autograd.grad(padded, maps, grad)
    (expected,) = torch.autograd.grad(reflect_pad(exact, 40), exact, grad.double())
    assert padded.dtype == result.dtype == dtype
    error = ((result.double() - expected) / expected).abs().max().item()
    assert error <= torch.finfo(dtype).eps
