"""Environment and self-test: what to run first on a new machine, and to paste into a bug report.

Prints versions, devices and backends, then compares every operator on every device, by every
backend and in every dtype that it takes, with a computation in float64 that shares nothing with the
backends: results without and with gradients, and the gradients. A line each gives the largest error
as a multiple of what rounding explains. The exit status is 1 if any is above 1, or a call fails.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .environment import accelerators, environment
from .ops import available_backends, reference
from .ops._dispatch import OPERATORS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Shape(NamedTuple):
    """Of a comparison: a map, heads of a dimension, a neighbourhood."""

    size: tuple[int, int]
    heads: int
    dim: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(-(-n // self.stride) for n in self.size)

    @property
    def geometry(self) -> tuple[int, int, int]:
        return self.kernel_size, self.stride, self.dilation


SHAPES = (
    Shape((33, 40), heads=2, dim=16, kernel_size=7),
    Shape((17, 23), heads=3, dim=5, kernel_size=7, stride=2),
    Shape((16, 19), heads=1, dim=64, kernel_size=5, dilation=2),
    Shape((2, 3), heads=2, dim=8, kernel_size=7),  # smaller than its neighbourhood
)


class Case(NamedTuple):
    """A call: ``operator(backend, *tensors)`` and ``exact(*tensors)`` compute the same.

    ``summands`` is the number of products that a result sums up.
    """

    tensors: list[Tensor]
    operator: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    summands: int


class Numbers:
    """Random inputs that every dtype holds exactly."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        # bfloat16 has fewer digits, float16 the narrower range.
        return torch.randn(shape, generator=self.generator).half().bfloat16().double()

    def signed(self, *shape: int) -> Tensor:
        """Two images of mean 0 and nothing near it.

        After a batch norm of :meth:`batch_norm`, on which side of a ReLU they are is not up to
        rounding.
        """
        numbers = self.normal(1, *shape)
        numbers = numbers.abs().clamp(0.5, 1.5).copysign(numbers)
        return torch.cat([numbers, -numbers])

    def batch_norm(self, channels: int, training: bool) -> nn.Module:
        norm = nn.BatchNorm2d(channels, dtype=torch.float64).train(training)
        with torch.no_grad():
            norm.running_var += self.normal(channels).abs()
            norm.weight += self.normal(channels).abs()
            norm.bias += self.normal(channels).clamp(-0.125, 0.125)
        return norm


def _like(norm: nn.Module, tensor: Tensor) -> nn.Module:
    """A copy in dtype and on the device of a tensor; that of another call has learned nothing."""
    return copy.deepcopy(norm).to(tensor.device, tensor.dtype)


# Of each operator, the comparisons at a shape.


def local_attention(shape: Shape, numbers: Numbers) -> Iterator[Case]:
    sizes = (shape.out, shape.size, shape.size)
    yield Case(
        [numbers.normal(2, shape.heads, shape.dim, *size) for size in sizes],
        lambda backend, *qkv: ops.local_attention(*qkv, *shape.geometry, backend=backend),
        lambda *qkv: reference.local_attention(*qkv, *shape.geometry),
        shape.kernel_size**2,
    )


def group_conv(shape: Shape, numbers: Numbers) -> Iterator[Case]:
    maps, outputs, steps = 3 * shape.heads, shape.dim * shape.heads, shape.geometry[1:]
    yield Case(
        [
            numbers.normal(2, shape.dim, maps, *shape.size),
            numbers.normal(outputs, maps, 3, 3),
            numbers.normal(outputs),
        ],
        lambda backend, m, w, b: ops.group_conv(m, w, *steps, b, backend),
        lambda m, w, b: reference.group_conv(m, w, *steps, b),
        9 * maps,
    )


def fused_acmix(shape: Shape, numbers: Numbers) -> Iterator[Case]:
    inputs, channels = 6, shape.heads * shape.dim
    shapes = (
        (2, inputs, *shape.size), (3 * channels, inputs, 1, 1), (3 * channels,), (shape.dim, 2),
        (channels, 3 * shape.heads, 3, 3), (channels,), (1,),
    )  # fmt: skip
    arguments = (shape.heads, *shape.geometry)
    x, weight, *rest = (numbers.normal(*s) for s in shapes)
    yield Case(
        [x, weight / 4, *rest],  # query, key and value of about 1
        lambda backend, *tensors: ops.fused_acmix(*tensors, *arguments, backend),
        lambda *tensors: reference.fused_acmix(*tensors, *arguments),
        inputs * (shape.kernel_size**2 + 9 * 3 * shape.heads),
    )


def local_aggregation(shape: Shape, numbers: Numbers) -> Iterator[Case]:
    weights = (2, shape.dim, shape.kernel_size**2, *shape.out)
    for mode in ('reflect', 'zeros'):
        yield Case(
            [numbers.normal(2, shape.heads * shape.dim, *shape.size), numbers.normal(*weights)],
            lambda backend, v, w, mode=mode: ops.local_aggregation(
                v, w, *shape.geometry, mode, backend
            ),
            lambda v, w, mode=mode: reference.local_aggregation(v, w, *shape.geometry, mode),
            shape.kernel_size**2,
        )


def patch_weights(shape: Shape, numbers: Numbers) -> Iterator[Case]:
    channels = shape.heads
    inputs = channels * (1 + shape.kernel_size**2)
    tensors = [numbers.signed(channels, *size) for size in (shape.out, shape.size)]
    tensors.append(numbers.normal(shape.dim, inputs, 1, 1))
    for training in (False, True):
        norm = numbers.batch_norm(inputs, training)
        yield Case(
            tensors,
            lambda backend, q, k, w, norm=norm: ops.patch_weights(
                q, k, w, _like(norm, q), *shape.geometry, backend
            ),
            lambda q, k, w, norm=norm: reference.patch_weights(
                q, k, w, _like(norm, q), *shape.geometry
            ),
            inputs,
        )


def norm_relu_conv(shape: Shape, numbers: Numbers) -> Iterator[Case]:
    channels = shape.heads * shape.dim
    tensors = [numbers.signed(channels, *shape.size), numbers.normal(shape.dim, channels, 1, 1)]
    tensors.append(numbers.normal(shape.dim))
    for training in (False, True):
        norm = numbers.batch_norm(channels, training)
        yield Case(
            tensors,
            lambda _, x, w, b, norm=norm: ops.norm_relu_conv(x, _like(norm, x), w, b),
            lambda x, w, b, norm=norm: reference.norm_relu_conv(x, _like(norm, x), w, b),
            channels,
        )


CASES = {
    function.__name__: function
    for function in (
        local_attention,
        group_conv,
        fused_acmix,
        local_aggregation,
        patch_weights,
        norm_relu_conv,
    )
}


class Expected(NamedTuple):
    """Of a case: the result, what is sent back from it, and the gradients of the tensors."""

    result: Tensor
    grad: Tensor
    gradients: tuple[Tensor, ...]


def expect(case: Case, numbers: Numbers) -> Expected:
    inputs = [tensor.clone().requires_grad_() for tensor in case.tensors]
    result = case.exact(*inputs)
    grad = numbers.normal(*result.shape)
    return Expected(result.detach(), grad, torch.autograd.grad(result, inputs, grad))


def largest_error(
    case: Case, expected: Expected, backend: str, device: str, dtype: torch.dtype
) -> float:
    """Of results and gradients, as a multiple of the tolerance; infinite for a wrong shape."""
    inputs = [tensor.to(device, dtype, copy=True) for tensor in case.tensors]
    with torch.no_grad():  # inference has kernels of its own
        found = [case.operator(backend, *inputs)]
    for tensor in inputs:
        tensor.requires_grad_()
    result = case.operator(backend, *inputs)
    gradients = torch.autograd.grad(result, inputs, expected.grad.to(device, dtype))
    found += [result.detach(), *gradients]
    right = (expected.result, expected.result, *expected.gradients)
    errors = []
    for tensor, exact in zip(found, right, strict=True):
        if tensor.shape != exact.shape or tensor.dtype != dtype:
            return math.inf
        summands = case.summands * max(1, expected.result.numel() // exact.numel())
        allowed = reference.tolerance(dtype, summands, exact.abs().max().item())
        error = (tensor.cpu().double() - exact).abs().max().item()
        errors.append(math.inf if math.isnan(error) else error / allowed)
    return max(errors)


def holds(device: str, dtype: torch.dtype) -> bool:
    """Whether a device has tensors of that dtype; Apple's have none of float64."""
    try:
        torch.zeros(1, dtype=dtype, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def check(operator: str, shapes: tuple[Shape, ...] = SHAPES) -> Iterator[bool]:
    """Compare an operator everywhere, print a line for each comparison, and give whether it holds.

    Args:
        operator (str): Name of one of the operators of :mod:`acmix_mm.ops`.
        shapes (tuple[Shape, ...]): Compared in each line. Default: :data:`SHAPES`.
    """
    numbers = Numbers()
    cases = [case for shape in shapes for case in CASES[operator](shape, numbers)]
    expected = [expect(case, numbers) for case in cases]
    implementations = OPERATORS.get(operator, {'torch': None})  # of some there is but one
    for device in ('cpu', *accelerators()):
        for dtype in filter(lambda dtype: holds(device, dtype), DTYPES):
            tensors = [t.to(device, dtype) for t in cases[0].tensors]
            for backend, implementation in implementations.items():
                if backend not in available_backends():
                    continue
                if implementation is not None and implementation.refuses(*tensors) is not None:
                    continue
                name = str(dtype).removeprefix('torch.')
                print(f'{operator:17}  {backend:6}  {device:4}  {name:8}', end='  ', flush=True)
                try:
                    pairs = zip(cases, expected, strict=True)
                    error = max(largest_error(*pair, backend, device, dtype) for pair in pairs)
                except Exception as failure:  # of a driver or compiler, most likely
                    print(f'FAILED  {type(failure).__name__}: {" ".join(str(failure).split())}')
                    yield False
                else:
                    print(f'{error:6.3f}  {"ok" if error <= 1 else "FAILED"}', flush=True)
                    yield error <= 1


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m acmix_mm.check',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        '--operators', nargs='+', choices=tuple(CASES), default=tuple(CASES), metavar='NAME',
        help=f'of {", ".join(CASES)}; default: all',
    )  # fmt: skip
    args = parser.parse_args(argv)
    print('\n'.join(f'{key}: {value}' for key, value in environment().items()))
    print('\noperator, backend, device, dtype, largest error / tolerance', flush=True)
    # TF32, PyTorch's default for convolutions in float32 on CUDA, has the digits of float16.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outcomes = [outcome for operator in args.operators for outcome in check(operator)]
    print(f'\n{sum(outcomes)} of {len(outcomes)} comparisons ok')
    return 0 if all(outcomes) else 1


if __name__ == '__main__':
    sys.exit(main())
