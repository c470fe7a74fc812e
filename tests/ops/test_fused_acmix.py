"""The fused operator on the CPU, which works in strips: some images, or some rows of one."""

import sys
from pathlib import Path

import pytest
import torch
from devices import needs_native
from hypothesis import given
from hypothesis import strategies as st

from acmix_mm.ops import fused_acmix

MODULE = sys.modules['acmix_mm.ops.fused_acmix']  # the package's attribute is the function
CPU_INFO = Path('/proc/cpuinfo')
HEADS, DIM, INPUTS = 2, 3, 5
CHANNELS = HEADS * DIM


@given(
    batch=st.integers(0, 5),
    height=st.integers(1, 90),
    reach=st.integers(0, 9),
    stride=st.integers(1, 5),
    rows=st.integers(0, 100),
)
def test_strips_cover_the_maps(batch, height, reach, stride, rows):
    """Whatever the cut, each output row is computed once, from all the input rows that it sees."""
    x = torch.empty(batch, 3, height, 4, device='meta')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, 'STRIP_BYTES', 9 * 4 * 4 * rows)
        strips = MODULE._strips(x, 9, reach, stride)
    images = range(batch)
    outputs = [(i, y) for s in strips for i in images[s.images] for y in range(s.begin, s.end)]
    assert outputs == [(i, y) for i in images for y in range(-(-height // stride))]
    for name in ('fresh', 'done'):
        inputs = [
            (i, y)
            for s in strips
            for i in images[s.images]
            for y in (range(s.fresh, s.last) if name == 'fresh' else range(s.first, s.done))
        ]
        assert inputs == [(i, y) for i in images for y in range(height)]
    for s in strips:
        for y in range(s.begin, s.end):
            assert s.first <= max(y * stride - reach, 0)
            assert min(y * stride + reach, height - 1) < s.last
        assert s.first % stride == 0
        assert s.last % stride == 0 or s.last == height
        # Reflection at the border ends within the strip, too.
        if (s.first, s.last) != (0, height):
            assert s.last - s.first > 2 * reach


def arguments(dtype, stride, size, kernel=3, channels=1, layout=torch.contiguous_format):
    torch.manual_seed(stride)
    shapes = (
        (2, INPUTS, *size), (3 * CHANNELS, INPUTS, 1, 1), (3 * CHANNELS,), (DIM, 2),
        (CHANNELS, 3 * HEADS, kernel, kernel), (CHANNELS,), (channels,),
    )  # fmt: skip
    x, *others = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return [t.requires_grad_() for t in (x.contiguous(memory_format=layout), *others)]


def differentiate(tensors, needed, *geometry, **options):
    out = fused_acmix(*tensors, HEADS, *geometry, **options)
    torch.manual_seed(0)
    grad = torch.randint(-9, 10, out.shape).to(out.dtype)  # the same in every dtype
    return [out, *torch.autograd.grad(out, [tensors[i] for i in needed], grad)]


@needs_native
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ('dtype', 'product_dtype'),
    [(dtype, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize(
    ('stride', 'dilation', 'kernel', 'channels', 'size'),
    [
        (1, 1, 3, 1, (40, 11)),
        (2, 1, 3, 1, (41, 8)),
        (3, 2, 5, CHANNELS, (70, 3)),
        (1, 3, 1, 1, (61, 1)),
        (2, 1, 9, CHANNELS, (33, 5)),
    ],
)
def test_strips_of_rows(
    stride, dilation, kernel, channels, size, dtype, product_dtype, layout, monkeypatch
):
    """Results and gradients are those of PyTorch's operators on whole maps in float64."""
    monkeypatch.setattr(MODULE, 'STRIP_BYTES', 1)
    monkeypatch.setattr(MODULE, '_product_dtype', lambda dtype: product_dtype)
    tensors = arguments(dtype, stride, size, kernel, channels, layout)
    reach = max(5, kernel) // 2 * dilation
    assert len(MODULE._strips(tensors[0], 3 * CHANNELS, reach, stride)) >= 4
    geometry = (5, stride, dilation)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = differentiate(exact, range(7), *geometry, backend='torch')
    rounded = differentiate(tensors, range(7), *geometry, backend='torch')
    got = differentiate(tensors, range(7), *geometry, backend='native')
    rounding = 1000 if dtype in (torch.float64, torch.float32) else 3
    for result, other, right in zip(got, rounded, expected, strict=True):
        assert result.dtype == dtype
        error, other_error = ((r.double() - right).norm() / right.norm() for r in (result, other))
        # Some gradients are small sums of large numbers, in PyTorch as here.
        assert error < 10 * other_error.nan_to_num(0) + rounding * torch.finfo(dtype).eps


@needs_native
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ('stride', 'size', 'channels', 'strip_bytes'),
    [(1, (40, 33), 1, 1), (2, (41, 18), CHANNELS, 1), (1, (9, 13), CHANNELS, 1 << 20)],
)
def test_half_precision_rounds_once(
    stride, size, channels, strip_bytes, dtype, autocast, monkeypatch
):
    """Results and gradients are the exact ones, rounded: nothing before is in half precision."""
    monkeypatch.setattr(MODULE, 'STRIP_BYTES', strip_bytes)
    monkeypatch.setattr(MODULE, '_product_dtype', lambda dtype: torch.float32)
    tensors = arguments(dtype, stride, size, channels=channels)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = differentiate(exact, range(7), 7, stride, 1, backend='torch')
    with torch.autocast('cpu', dtype, enabled=autocast):
        got = differentiate(tensors, range(7), 7, stride, 1, backend='native')
    for result, right in zip(got, expected, strict=True):
        assert result.dtype == dtype
        # Half a unit in the last place at most, and float32's own errors.
        torch.testing.assert_close(
            result.double(),
            right,
            rtol=torch.finfo(dtype).eps / 2,
            atol=1e-5 * right.abs().max().item(),
        )


@needs_native
@pytest.mark.skipif(not CPU_INFO.is_file(), reason='compares with what Linux says of the processor')
def test_bfloat16_products_by_processor():
    """With AMX they are bfloat16's; without it or AVX512_BF16, float32's; else either."""
    flags = CPU_INFO.read_text().split()
    allowed = {torch.bfloat16, torch.float32}
    if torch.backends.cpu.get_cpu_capability() != 'AVX512' or 'avx512_bf16' not in flags:
        allowed = {torch.float32}
    elif 'amx_bf16' in flags:
        allowed = {torch.bfloat16}
    assert MODULE._product_dtype(torch.bfloat16) in allowed
    for dtype in (torch.float16, torch.float32):
        assert MODULE._product_dtype(dtype) == torch.float32
    assert MODULE._product_dtype(torch.float64) == torch.float64


@needs_native
@pytest.mark.parametrize(('stride', 'dilation'), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_rows_are_projected_once(stride, dilation, monkeypatch):
    """A strip takes over the rows that it shares with the one before."""
    monkeypatch.setattr(MODULE, 'STRIP_BYTES', 1)
    tensors = arguments(torch.float32, stride, (90, 11))
    pixels = []

    def product(left, right, out):
        pixels.append(right.size(1))
        return torch.addmm(out, left, right, beta=0, out=out)

    monkeypatch.setattr(MODULE, 'product', product)
    with torch.no_grad():
        fused_acmix(*tensors, HEADS, 5, stride, dilation, backend='native')
    assert len(pixels) > 4
    assert sum(pixels) == 2 * 90 * 11


@needs_native
@pytest.mark.parametrize('needed', [[0], [1], [2], [3], [4], [5], [6], [3, 6], [0, 4]])
def test_needed_gradients_of_strips(needed, monkeypatch):
    monkeypatch.setattr(MODULE, 'STRIP_BYTES', 1)
    tensors = arguments(torch.float64, 1, (40, 6))
    expected = differentiate(tensors, range(7), 5, 1, 1, backend='torch')
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in needed)
    got = differentiate(tensors, needed, 5, 1, 1, backend='native')
    for result, right in zip(got, [expected[0], *(expected[1 + i] for i in needed)], strict=True):
        torch.testing.assert_close(result, right)


@needs_native
@pytest.mark.parametrize('rows', [1, 30, 61, 10**6])
def test_threads_change_rounding_at_most(rows, monkeypatch):
    """In strips of any height: the products of matrices are PyTorch's, which divides them."""
    monkeypatch.setattr(MODULE, 'STRIP_BYTES', 4 * 3 * CHANNELS * 24 * rows)
    tensors = arguments(torch.float32, 1, (60, 24))
    results = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(differentiate(tensors, range(7), 7, 1, 1, backend='native'))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-5, atol=1e-5 * first.abs().max().item())


@needs_native
def test_infinities_stay_where_they_are_seen(monkeypatch):
    """A NaN in a strip reaches no row that does not see it, though buffers are used again."""
    monkeypatch.setattr(MODULE, 'STRIP_BYTES', 1)
    tensors = arguments(torch.float32, 1, (60, 9))
    with torch.no_grad():
        tensors[0][0, :, 30, 4] = float('nan')
    out = fused_acmix(*tensors, HEADS, 5, 1, 1, backend='native')
    (grad,) = torch.autograd.grad(out, tensors[0], torch.ones_like(out))
    assert out[0, :, 28:33, 2:7].isnan().all()
    assert out.isnan().sum() == CHANNELS * 25
    # Gradients: of the pixels that share a neighbourhood with it.
    assert grad.isnan().any()
    assert not grad[1].isnan().any()
    assert not grad[0, :, :26].isnan().any()
    assert not grad[0, :, 35:].isnan().any()
