import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_mm.layers.mixing_weights import MixingWeights, folding_pays, shift_kernel


def two_steps(maps, fc, dep, stride, dilation, fc_bias):
    """fc on every head position, then the grouped convolution, as section 4.2 states them."""
    mixed = torch.einsum('km,bgmhw->bgkhw', fc, maps) + fc_bias.view(-1, 1, 1)
    padding = dep.size(-1) // 2 * dilation
    return F.conv2d(mixed.flatten(1, 2), dep, None, stride, padding, dilation, maps.size(1))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 4, 5, 8]),
    positions=st.integers(1, 4),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    with_bias=st.booleans(),
    folds=st.booleans(),
)
def test_equals_its_two_steps(
    heads, positions, size, kernel_size, stride, dilation, with_bias, folds
):
    maps = torch.randn(2, positions, 3 * heads, *size, dtype=torch.float64, requires_grad=True)
    fc = torch.randn(kernel_size**2, 3 * heads, dtype=torch.float64, requires_grad=True)
    shape = (positions * heads, kernel_size**2, kernel_size, kernel_size)
    dep = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(kernel_size**2, dtype=torch.float64) * with_bias
    bias.requires_grad_()
    geometry = {'groups': positions, 'stride': stride, 'dilation': dilation}
    weights = MixingWeights(dep, fc, bias if with_bias else None, **geometry)
    weights = weights.folded() if folds else weights
    out = weights.convolve(maps)
    expected = two_steps(maps, fc, dep, stride, dilation, bias)
    assert out.shape[-2:] == (-(-size[0] // stride), -(-size[1] // stride))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    leaves = (maps, fc, dep, bias) if with_bias else (maps, fc, dep)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_shift_kernel_sums_shifted_maps(kernel_size):
    """Every output is the sum of the k * k maps of its group, each moved by its position."""
    groups, radius = 2, kernel_size // 2
    maps = torch.randn(1, groups, kernel_size**2, 7, 8)
    kernel = shift_kernel(3 * groups, groups, kernel_size)
    out = F.conv2d(maps.flatten(1, 2), kernel, padding=radius, groups=groups)
    padded = F.pad(maps, (radius,) * 4)
    expected = sum(
        padded[:, :, i * kernel_size + j, i : i + 7, j : j + 8]
        for i in range(kernel_size)
        for j in range(kernel_size)
    )
    torch.testing.assert_close(out, expected.repeat_interleave(3, dim=1))


def test_folding_pays_for_few_heads():
    """Multiplications a pixel, from section 4.2 at 64 channels: 27 C N against 27 C + 81 C."""
    for heads, pays in ((1, True), (4, True), (8, False), (32, False)):
        assert (27 * 64 * heads <= (27 * heads * (64 // heads)) + 81 * 64) == pays
        assert folding_pays(3 * heads, 64, 64 // heads, 3) == pays
