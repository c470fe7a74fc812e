import pytest
import torch

from acmix_mm.ops import local_aggregation
from acmix_mm.ops import reference as oracles
from acmix_mm.ops.export import decompositions, unrolled_local_attention


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


@pytest.mark.parametrize('padding_mode', ['reflect', 'zeros'])
@pytest.mark.parametrize(('kernel_size', 'stride', 'dilation'), [(7, 1, 1), (3, 2, 1), (5, 2, 3)])
def test_aggregation_decomposes(kernel_size, stride, dilation, padding_mode):
    """An exported program with other sizes than it was traced with."""

    class Aggregation(torch.nn.Module):
        def forward(self, value, weight):
            return local_aggregation(value, weight, *geometry, padding_mode, 'torch')

    def inputs(height, width):
        value = torch.randn(2, 6, height, width)
        size = (-(-height // stride), -(-width // stride))
        return value, torch.randn(2, 3, kernel_size**2, *size)

    geometry = (kernel_size, stride, dilation)
    rows, columns = torch.export.Dim('rows', min=3), torch.export.Dim('columns', min=3)
    value_sizes = (rows, columns) if stride == 1 else (stride * rows, stride * columns)
    sizes = ({2: value_sizes[0], 3: value_sizes[1]}, {3: rows, 4: columns})
    program = torch.export.export(Aggregation(), inputs(24, 36), dynamic_shapes=sizes)
    program = program.run_decompositions(decompositions())
    assert 'acmix_mm' not in program.graph_module.code
    for size in ((24, 36), (60, 30)):
        value, weight = inputs(*size)
        expected = local_aggregation(value, weight, *geometry, padding_mode)
        torch.testing.assert_close(program.module()(value, weight), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_aggregation_sums_in_float32():
    value, weight = torch.randn(1, 6, 9, 8).half(), torch.randn(1, 3, 49, 3, 2).half()
    operator = torch.ops.acmix_mm.local_aggregation.default
    out = decompositions()[operator](value, weight, 7, 1, 1)
    assert out.dtype == torch.float16
    expected = operator(value.double(), weight.double(), 7, 1, 1)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
