import oracles
import pytest
import torch

from acmix_mm.ops.export import unrolled_local_attention


@pytest.mark.parametrize(
    ('size', 'kernel_size', 'stride', 'dilation'),
    [
        ((9, 12), 7, 1, 1),
        ((5, 8), 3, 2, 1),
        ((11, 6), 5, 1, 3),
        ((2, 3), 7, 2, 2),
        ((1, 4), 3, 1, 1),
    ],
)
def test_equals_the_oracle(size, kernel_size, stride, dilation):
    key, value = torch.randn(2, 2, 3, 4, *size, dtype=torch.float64)
    query = torch.randn_like(key)[..., ::stride, ::stride]
    geometry = (kernel_size, stride, dilation, 0.3)
    out = unrolled_local_attention(query, key, value, *geometry)
    torch.testing.assert_close(out, oracles.local_attention(query, key, value, *geometry))


def test_half_precision_sums_in_float32():
    tensors = [t.half() for t in torch.randn(3, 1, 2, 8, 6, 7)]
    out = unrolled_local_attention(*tensors, 7, 1, 1, 1.0)
    assert out.dtype == torch.float16
    expected = oracles.local_attention(*tensors, 7, scale=1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
