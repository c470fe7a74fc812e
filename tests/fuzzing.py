"""What the fuzzing of operators and layers shares: layouts in memory, tolerances, examples."""

from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor


def _apart(tensor: Tensor) -> Tensor:
    """Every other number of a storage, NaN between them."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


def _crop(tensor: Tensor) -> Tensor:
    """Part of a larger map, NaN around."""
    larger = tensor.new_full([n + 3 for n in tensor.shape], torch.nan)
    larger[tuple(slice(1, n + 1) for n in tensor.shape)] = tensor
    return larger[tuple(slice(1, n + 1) for n in tensor.shape)]


def _shifted(tensor: Tensor) -> Tensor:
    """One number into its storage: less aligned than vectors are."""
    flat = torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])
    return flat[1:].view(tensor.shape)


def _reordered(first: int, second: int) -> Callable[[Tensor], Tensor]:
    """Memory has one dimension at the place of another; shape and numbers stay."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:
            return tensor
        return tensor.movedim(first, second).contiguous().movedim(second, first)

    return change


LAYOUTS = {
    'contiguous': lambda t: t,
    'channels last': _reordered(1, -1),
    'columns first': _reordered(-1, -2),
    'batch inside': _reordered(0, -1),
    'numbers apart': _apart,
    'crop': _crop,
    'shifted': _shifted,
    'one row for all': lambda t: t if t.dim() < 2 else t[..., :1, :].expand(t.shape),
    'one batch for all': lambda t: t[:1].expand(t.shape),
}
layouts = st.sampled_from(list(LAYOUTS))

# Of a result, relative to the largest number of the oracle's, or to what it is a difference of: 1,
# the size of the numbers that go in.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 2**-7,
    torch.bfloat16: 2**-4,
}
# Axes: mostly short, where borders are everything; 1 is a kind of its own.
axes = st.one_of(st.just(1), st.integers(1, 7), st.integers(1, 40))
sizes = st.tuples(axes, axes)
# Strides and dilations: those of models, and some beyond every map.
steps = st.one_of(st.integers(1, 3), st.integers(1, 90))
batches = st.sampled_from([1, 1, 2, 3, 0])
seeds = st.integers(0, 2**32 - 1)


def make(data, shape: Iterable[int], dtype: torch.dtype, deviation: float = 1) -> Tensor:
    """Normal numbers in some layout; a leaf that gets gradients."""
    numbers = (torch.randn(*shape, dtype=torch.float64) * deviation).to(dtype)
    return LAYOUTS[data.draw(layouts)](numbers).requires_grad_()


def assert_close(
    result: Tensor,
    expected: Tensor,
    what: str,
    tolerance: float | None = None,
    summands: float = 1,
):
    """Finite, of the same shape, and within the dtype's tolerance.

    That is for sums of 16 ``summands``, which the gradient of a weight has for each pixel; rounding
    of more of them grows with the square root of their number.
    """
    assert result.shape == expected.shape, what
    assert result.isfinite().all(), what
    if expected.numel():
        bound = (tolerance or TOLERANCES[result.dtype]) * max(1, expected.abs().max().item())
        bound *= max(1, summands / 16) ** 0.5
        error = (result.double() - expected.double()).abs().max().item()
        assert error <= bound, f'{what}: error {error:.2e}, allowed {bound:.2e}'


def fuzzed(few: int, many: int):
    """Parameter ``examples`` of a test: few, the same each time, or many others (slow)."""
    parameters = [
        pytest.param(few, id='few'),
        pytest.param(many, id='many', marks=pytest.mark.slow),
    ]
    return pytest.mark.parametrize('examples', parameters)


def fuzz(check: Callable, examples: int, campaign: Callable, case: str) -> None:
    """``check(data)`` for so many examples, each of which counts for the campaign."""

    @settings(
        max_examples=examples,
        derandomize=examples < 50,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(data=st.data(), seed=seeds)
    def run(data, seed):
        torch.manual_seed(seed)
        check(data)
        campaign('fuzzing of operators', case)

    run()
