"""Operators in C++ for the CPU: float64, float32, bfloat16 and float16.

Neighbourhood attention, a grouped convolution for few channels a group, the weights of patchwise
attention and the sum of values by them.

The library is compiled from ``csrc`` when the package is installed; where that failed,
:data:`MISSING` says why and the PyTorch backend serves. Kernels for AVX-512, AVX2 and baseline
processors are chosen at run time; ``ATEN_CPU_CAPABILITY`` limits the choice as it does for
PyTorch's own.
"""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from .._autograd import refuse_second_order, register_bilinear

REASON_FILE = Path(__file__).parents[1] / 'native_build.txt'  # written by setup.py
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _load() -> str | None:
    """Load the compiled library, which registers the operators; or say why there is none."""
    again = (
        'install acmix_mm anew beside this torch, with a C++ compiler: '
        'pip install --force-reinstall --no-deps FOLDER_OF_ITS_SOURCES'
    )
    spec = importlib.util.find_spec('acmix_mm.ops._native')
    if spec is None:
        reason = 'they were not built'
        if REASON_FILE.is_file():
            reason = f'their build failed ({REASON_FILE.read_text().strip()})'
        return f'{reason}; {again}'
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f'{spec.origin} does not load ({error}); {again}'
    return None


MISSING = _load()


def refuses(tensor: Tensor, *args) -> str | None:
    """What the operators need of their first tensor, where it is otherwise."""
    if tensor.device.type != 'cpu':
        return f'tensors on the CPU, got {tensor.device}'
    if tensor.dtype not in DTYPES:
        return f'float64, float32, bfloat16 or float16, got {tensor.dtype}'
    return None


def _register_local_attention() -> None:
    forward = 'acmix_mm::local_attention_native_forward'
    backward = 'acmix_mm::local_attention_native_backward'

    @torch.library.register_fake(forward)
    def _(query, key, value, kernel_size, stride, dilation, scale):
        dtype = torch.promote_types(query.dtype, torch.float32)
        return (
            query.new_empty(query.shape),
            query.new_empty((*query.shape[:2], *query.shape[3:]), dtype=dtype),
        )

    @torch.library.register_fake(backward)
    def _(grad, query, key, value, lse, kernel_size, stride, dilation, scale):
        return tuple(t.new_empty(t.shape) for t in (query, key, value))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], output[1])
        ctx.geometry = inputs[3:]

    def differentiate(ctx, grad, grad_lse):
        gradients = torch.ops.acmix_mm.local_attention_native_backward(
            grad, *ctx.saved_tensors, *ctx.geometry
        )
        return *gradients, None, None, None, None

    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    refuse_second_order(backward, 'local_attention', 'native')


def _register_group_conv() -> None:
    ops = torch.ops.acmix_mm
    names = ('group_conv_native', 'group_conv_native_grad_input', 'group_conv_native_grad_weight')

    @torch.library.register_fake(f'acmix_mm::{names[0]}')
    def _(input, weight, bias, stride, dilation, groups):
        size = ((length - 1) // stride + 1 for length in input.shape[2:])
        return input.new_empty((input.size(0), weight.size(0), *size))

    @torch.library.register_fake(f'acmix_mm::{names[1]}')
    def _(grad, weight, height, width, stride, dilation, groups):
        return grad.new_empty((grad.size(0), weight.size(1) * groups, height, width))

    @torch.library.register_fake(f'acmix_mm::{names[2]}')
    def _(grad, input, kernel_size, stride, dilation, groups):
        shape = (grad.size(1), input.size(1) // groups, kernel_size, kernel_size)
        return grad.new_empty(shape)

    register_bilinear(
        names,
        3,
        lambda input, weight, options: ops.group_conv_native(input, weight, None, *options),
        lambda grad, weight, input, options: ops.group_conv_native_grad_input(
            grad, weight, *input.shape[2:], *options
        ),
        lambda grad, input, weight, options: ops.group_conv_native_grad_weight(
            grad, input, weight.size(-1), *options
        ),
    )


def _register_local_aggregation() -> None:
    ops = torch.ops.acmix_mm
    names = (
        'local_aggregation_native',
        'local_aggregation_native_grad_value',
        'local_aggregation_native_grad_weight',
    )

    @torch.library.register_fake(f'acmix_mm::{names[0]}')
    def _(value, weight, kernel_size, stride, dilation, zeros):
        return value.new_empty((*value.shape[:2], *weight.shape[-2:]))

    @torch.library.register_fake(f'acmix_mm::{names[1]}')
    def _(grad, weight, height, width, kernel_size, stride, dilation, zeros):
        return grad.new_empty((*grad.shape[:2], height, width))

    @torch.library.register_fake(f'acmix_mm::{names[2]}')
    def _(grad, value, groups, kernel_size, stride, dilation, zeros):
        return grad.new_empty((grad.size(0), groups, kernel_size**2, *grad.shape[2:]))

    register_bilinear(
        names,
        4,
        lambda value, weight, options: ops.local_aggregation_native(value, weight, *options),
        lambda grad, weight, value, options: ops.local_aggregation_native_grad_value(
            grad, weight, *value.shape[2:], *options
        ),
        lambda grad, value, weight, options: ops.local_aggregation_native_grad_weight(
            grad, value, weight.size(1), *options
        ),
    )


def _register_patch_weights() -> None:
    forward, backward = 'acmix_mm::patch_weights_native', 'acmix_mm::patch_weights_native_backward'

    @torch.library.register_fake(forward)
    def _(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation):
        return query.new_empty((query.size(0), weight.size(1), *query.shape[2:]))

    @torch.library.register_fake(backward)
    def _(grad, query, padded, mean, factor, shift, weight, kernel_size, stride, dilation):
        return tuple(t.new_empty(t.shape) for t in (query, padded, factor, shift, weight))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:6])
        ctx.geometry = inputs[6:]

    def differentiate(ctx, grad):
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint computes them anew
        query, padded, factor, shift, weight = torch.ops.acmix_mm.patch_weights_native_backward(
            grad, *tensors, *ctx.geometry
        )
        mean = -shift * tensors[3]
        return query, padded, mean, factor, shift, weight, None, None, None

    torch.library.register_autograd(forward, differentiate, setup_context=setup_context)
    refuse_second_order(backward, 'patch_weights', 'native')


if MISSING is None:
    _register_local_attention()
    _register_group_conv()
    _register_local_aggregation()
    _register_patch_weights()


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """Arguments, already checked, and result as in :func:`acmix_mm.ops.local_attention`.

    Training keeps inputs and one log-sum-exp a query and head. Memory beyond that: some
    packed rows a thread; for half precision, the backward pass also sums the gradients of key and
    value in float32.
    """
    return torch.ops.acmix_mm.local_attention_native_forward(
        query, key, value, kernel_size, stride, dilation, scale
    )[0]


def local_attention_add_(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    query_bias: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    factor: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
    height: int,
    first_query: int = 0,
    first_key: int = 0,
) -> None:
    """Add ``factor`` (N, d) times attention to ``output``; ``lse`` gets a log-sum-exp a query.

    Queries are taken plus ``query_bias`` (N, d), keys less ``slopes`` (d, 2) times their position
    (x, y), linspace(-1, 1) over width and height. Tensors may hold some rows of a map of ``height``
    rows: output, lse (B, N, h, w) and query those of the queries from ``first_query`` on, key and
    value the rows from ``first_key`` on, among which must be all that the queries see. Not
    differentiable by itself.
    """
    geometry = (kernel_size, stride, dilation, scale, height, first_query, first_key)
    torch.ops.acmix_mm.local_attention_native_forward_add_(
        output, lse, query, query_bias, key, value, slopes, factor, *geometry
    )


def local_attention_backward_add_(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad: Tensor,
    query: Tensor,
    query_bias: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    factor: float,
    lse: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
    height: int,
    first_query: int = 0,
    first_key: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`local_attention_add_` with one factor for all channels.

    Adds to the first three, of which key's and value's are float32 for half precision, and returns
    the gradients of ``slopes`` (d, 2) and ``factor`` (1,) in float64: of rows, what these queries
    contribute.
    """
    geometry = (kernel_size, stride, dilation, scale, height, first_query, first_key)
    return torch.ops.acmix_mm.local_attention_native_backward_add_(
        grad_query, grad_key, grad_value, grad, query, query_bias, key, value, slopes, factor, lse,
        *geometry,
    )  # fmt: skip


def group_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> Tensor:
    """Grouped convolution with square odd kernels and zero padding that keeps the size at stride 1.

    As :func:`torch.nn.functional.conv2d` with ``padding = k // 2 * dilation``, for few channels a
    group, where that is slow. The input, (B, C, H, W), may have any strides; the sums of half
    precision are float32. Memory beyond inputs and results: some packed rows a thread, and for the
    gradient of the weight at most 64 partial sums.
    """
    return torch.ops.acmix_mm.group_conv_native(input, weight, bias, stride, dilation, groups)


def local_aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    padding_mode: str,
) -> Tensor:
    """Arguments, already checked, and result as in :func:`acmix_mm.ops.local_aggregation`.

    It may be differentiated any number of times. Memory beyond inputs and results: some packed rows
    a thread; for half precision, gradients of values are also summed in float32.
    """
    return torch.ops.acmix_mm.local_aggregation_native(
        value, weight, kernel_size, stride, dilation, padding_mode == 'zeros'
    )


def patch_weights(
    query: Tensor,
    padded: Tensor,
    mean: Tensor,
    factor: Tensor,
    shift: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """1x1 convolution of the ReLU of ``(x - mean) * factor + shift``, x a query beside the patch.

    Training keeps the arguments. Memory beyond them and results: the maps in float32 for half
    precision, and some chunks of pixels a thread.

    Args:
        query (Tensor): Shape (B, R, ceil(H / stride), ceil(W / stride)).
        padded (Tensor): Map (B, R, H + 2 p, W + 2 p), p = dilation * (kernel_size // 2), dtype of
            ``query``.
        mean (Tensor): Shape (R * (1 + k * k),), float64 for such maps and float32 for others, as
            all that follow; input channels are the query's, then ``channel * k * k + position``.
        factor (Tensor): As ``mean``.
        shift (Tensor): As ``mean``.
        weight (Tensor): Shape (R * (1 + k * k), O).
        kernel_size (int): Side k of the patch.
        stride (int): Pixels between patches.
        dilation (int): Pixels between the positions of a patch.

    Returns:
        Tensor: Shape (B, O, ceil(H / stride), ceil(W / stride)), dtype of ``query``.
    """
    return torch.ops.acmix_mm.patch_weights_native(
        query, padded, mean, factor, shift, weight, kernel_size, stride, dilation
    )
