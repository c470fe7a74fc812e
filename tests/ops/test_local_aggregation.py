import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_mm.ops import local_aggregation
from acmix_mm.ops import reference as oracles


def naive(value, weight, kernel_size, stride=1, dilation=1):
    """Unfolded neighbourhoods, in float64."""
    value, weight = value.double(), weight.double()
    index = oracles.neighbours(*value.shape[-2:], kernel_size, stride, dilation)
    groups = torch.arange(value.size(1)) % weight.size(1)
    weights = weight[:, groups].permute(0, 1, 3, 4, 2)
    return (value.flatten(2)[..., index] * weights).sum(-1)


def inputs(channels, groups, size, kernel_size, stride, dtype=torch.float64):
    size_out = [-(-n // stride) for n in size]
    value = torch.randn(2, channels, *size, dtype=dtype, requires_grad=True)
    weight = torch.randn(2, groups, kernel_size**2, *size_out, dtype=dtype, requires_grad=True)
    return value, weight


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
def test_equals_unfolded_sum(groups, share, size, kernel_size, stride, dilation):
    value, weight = inputs(groups * share, groups, size, kernel_size, stride)
    geometry = (kernel_size, stride, dilation)
    out, expected = local_aggregation(value, weight, *geometry), naive(value, weight, *geometry)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (value, weight), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (value, weight), grad))


@settings(max_examples=30, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.sampled_from([1, 3, 7]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
def test_zeros_beyond_the_border(size, kernel_size, stride, dilation):
    value, weight = inputs(4, 2, size, kernel_size, stride)
    geometry = (kernel_size, stride, dilation)
    out = local_aggregation(value, weight, *geometry, padding_mode='zeros')
    windows = F.unfold(value, kernel_size, dilation, kernel_size // 2 * dilation, stride)
    windows = windows.view(2, 2, 2, kernel_size**2, *out.shape[-2:])  # c = 2 * i + group
    expected = (windows * weight[:, None]).sum(3).flatten(1, 2)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (value, weight), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (value, weight), grad))


def test_gradcheck():
    torch.autograd.gradcheck(lambda v, w: local_aggregation(v, w, 3, 2), inputs(4, 2, (4, 5), 3, 2))


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_rounding_of_each_dtype(dtype, tolerance):
    value, weight = inputs(16, 2, (9, 8), 7, 1, dtype)
    out = local_aggregation(value, weight)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), naive(value, weight, 7), rtol=tolerance, atol=20 * tolerance
    )


def test_opcheck():
    """Schema, fake kernel and autograd registration, as torch.compile needs them."""
    _, weight = inputs(4, 2, (5, 6), 3, 1)
    padded = torch.randn(2, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.acmix_mm.local_aggregation.default, (padded, weight, 3, 1, 1))


def test_ones_average_a_constant_map():
    value, weight = torch.full((1, 8, 3, 4), 2.5), torch.full((1, 1, 49, 3, 4), 1 / 49)
    torch.testing.assert_close(local_aggregation(value, weight), value)


@pytest.mark.parametrize(
    ('value', 'weight', 'message'),
    [
        ((1, 8, 3), (1, 1, 49, 3, 4), r'value must have shape \(B, C, H, W\)'),
        ((1, 8, 3, 4), (1, 1, 9, 3, 4), r'weight must have shape \(1, G, 49, 3, 4\)'),
        ((1, 8, 3, 4), (1, 3, 49, 3, 4), 'number of groups that divides 8, got 3'),
    ],
)
def test_wrong_arguments(value, weight, message):
    with pytest.raises(ValueError, match=message):
        local_aggregation(torch.zeros(value), torch.zeros(weight))


def test_wrong_padding_mode():
    with pytest.raises(ValueError, match="padding_mode must be 'reflect' or 'zeros', got 'same'"):
        local_aggregation(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 49, 3, 4), padding_mode='same')


def test_wrong_dtype():
    with pytest.raises(ValueError, match='value and weight must have one dtype'):
        local_aggregation(torch.zeros(1, 8, 3, 4), torch.zeros(1, 1, 49, 3, 4).double())


@pytest.mark.parametrize('result', ['output', 'gradient of value', 'gradient of weight'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype, result):
    """Sums are float32: what comes out is the exact sum, rounded to half precision."""
    tensors = inputs(32, 2, (9, 8), 7, 1, dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    # Zeros beyond the border: gradients of reflected values are summed outside of the operator.
    out, exact = (local_aggregation(*pair, padding_mode='zeros') for pair in (tensors, doubles))
    if result != 'output':
        leaf = ['gradient of value', 'gradient of weight'].index(result)
        grad = torch.randn_like(out)
        (out,) = torch.autograd.grad(out, tensors[leaf], grad)
        (exact,) = torch.autograd.grad(exact, doubles[leaf], grad.double())
    assert out.dtype == dtype
    # Half a unit in the last place, at most eps / 2 of the result, and float32's own errors.
    rounding = 1.01 * torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), exact, rtol=rounding, atol=1e-4)
