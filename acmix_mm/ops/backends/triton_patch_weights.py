"""Weights of patchwise attention for inference, in Triton: float32, bfloat16 and float16.

A program computes a tile of pixels as a sum of matrix products: for the query and each position of
the patch, pixels by channels, which are normalised and rectified on the way, times channels by
outputs. Nothing of the patch's size exists outside registers. Sums are float32's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import check_dtypes, check_geometry, check_shape
from .triton_backend import _precision
from .triton_group_conv import _addresses, _jit, _tile, alignment, beyond_32_bits, empty_maps
from .triton_kernels import _dot

# Rows and columns of a tile, and outputs and channels of a product, at most. Read off compilations
# (tools/dev/triton_report.py), not measured: nothing spills.
TILE = (8, 8)
LARGEST_OUTPUTS = 64
LARGEST_CHANNELS = 32


@triton.jit
def _product(
    x, inputs, o, mean, factor, shift, weight, weight_i, weight_o, real, OUTPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of pixels by channels ``x``, normalised and rectified, with their columns of the weight."""
    m = tl.load(mean + inputs, mask=real, other=0).to(tl.float32)
    f = tl.load(factor + inputs, mask=real, other=0).to(tl.float32)
    s = tl.load(shift + inputs, mask=real, other=0).to(tl.float32)
    a = (x.to(tl.float32) - m[None, :]) * f[None, :] + s[None, :]
    a = tl.where(a < 0, 0, a).to(x.dtype)  # a NaN stays one
    columns = weight + inputs[:, None] * weight_i + o[None, :] * weight_o
    w = tl.load(columns, mask=real[:, None] & (o < OUTPUTS)[None, :], other=0)
    return _dot(a, w.to(x.dtype), PRECISION)


@_jit
def patch_weights_kernel(
    query, padded, mean, factor, shift, weight, result,
    query_b, query_c, query_y, query_x,
    padded_b, padded_c, padded_y, padded_x,
    weight_i, weight_o,
    result_b, result_c, result_y, result_x,
    height, width, dilation,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, WIDE: tl.constexpr, QUERY_ALIGN: tl.constexpr,
    PADDED_ALIGN: tl.constexpr, RESULT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """A tile of queries, (height, width) all in all; BLOCK_O of the outputs."""
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    BLOCKS_O: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    POSITIONS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    pid = tl.program_id(0)
    o = pid % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    batch, y, x = _tile(pid // BLOCKS_O, height, width, TILE_Y, TILE_X)
    query += batch * query_b
    padded += batch * padded_b
    result += batch * result_b
    exists = (y < height) & (x < width)

    acc = tl.zeros([TILE_Y * TILE_X, BLOCK_O], tl.float32)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        addresses = _addresses(
            query, y[:, None], x[:, None], c[None, :], query_c, query_y, query_x, WIDE, QUERY_ALIGN
        )
        q = tl.load(addresses, mask=exists[:, None] & (c < CHANNELS)[None, :], other=0)
        acc += _product(
            q, c, o, mean, factor, shift, weight, weight_i, weight_o, c < CHANNELS, OUTPUTS,
            PRECISION,
        )  # fmt: skip
    for step in range(POSITIONS * BLOCKS_C):
        position = step // BLOCKS_C
        c = step % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
        at_y = y * STRIDE + position // KERNEL_SIZE * dilation
        at_x = x * STRIDE + position % KERNEL_SIZE * dilation
        addresses = _addresses(
            padded, at_y[:, None], at_x[:, None], c[None, :],
            padded_c, padded_y, padded_x, WIDE, PADDED_ALIGN,
        )  # fmt: skip
        k = tl.load(addresses, mask=exists[:, None] & (c < CHANNELS)[None, :], other=0)
        acc += _product(
            k, CHANNELS + c * POSITIONS + position, o, mean, factor, shift, weight, weight_i,
            weight_o, c < CHANNELS, OUTPUTS, PRECISION,
        )  # fmt: skip
    addresses = _addresses(
        result, y[:, None], x[:, None], o[None, :], result_c, result_y, result_x, WIDE, RESULT_ALIGN
    )
    mask = exists[:, None] & (o < OUTPUTS)[None, :]
    tl.store(addresses, acc.to(result.dtype.element_ty), mask=mask)


@torch.library.custom_op('acmix_mm::patch_weights_triton', mutates_args=())
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
    """Arguments and result as of :func:`.native_backend.patch_weights`, but without gradients.

    Maps of any strides are taken as they are; channels of the result are last in memory where the
    query's are. No memory beyond the result.
    """
    _check(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation)
    result = empty_maps(query, query.size(0), weight.size(1), query.shape[2:])
    if result.numel() == 0:
        return result
    channels, outputs = query.size(1), weight.size(1)
    block_c = min(LARGEST_CHANNELS, max(16, triton.next_power_of_2(channels)))
    block_o = min(LARGEST_OUTPUTS, max(8, triton.next_power_of_2(outputs)))
    batch, _, height, width = query.shape
    tiles = batch * triton.cdiv(height, TILE[0]) * triton.cdiv(width, TILE[1])
    vectors = (t.contiguous() for t in (mean, factor, shift))
    with torch.cuda.device_of(query):
        patch_weights_kernel[(tiles * triton.cdiv(outputs, block_o),)](
            *(query, padded, *vectors, weight, result),
            *(*query.stride(), *padded.stride(), *weight.stride(), *result.stride()),
            *(height, width, dilation),
            CHANNELS=channels,
            OUTPUTS=outputs,
            KERNEL_SIZE=kernel_size,
            STRIDE=min(stride, max(padded.shape[2:])),
            BLOCK_C=block_c,
            BLOCK_O=block_o,
            WIDE=beyond_32_bits(query, padded, result),
            QUERY_ALIGN=alignment(query, 1),
            PADDED_ALIGN=alignment(padded, 1),
            RESULT_ALIGN=alignment(result, 1),
            PRECISION=_precision(query.dtype),
            TILE_Y=TILE[0],
            TILE_X=TILE[1],
        )
    return result


@patch_weights.register_fake
def _(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation):
    return empty_maps(query, query.size(0), weight.size(1), query.shape[2:])


def _check(
    query: Tensor,
    padded: Tensor,
    mean: Tensor,
    factor: Tensor,
    shift: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> None:
    """Of calls without the front's checks: kernels take sizes and strides at their word."""
    check_geometry(kernel_size, stride, dilation)
    check_dtypes(query=query, padded=padded)
    check_dtypes(mean=mean, factor=factor, shift=shift, weight=weight)
    if query.dim() != 4 or padded.dim() != 4 or min(query.shape[1:]) < 1:
        raise ValueError(
            'query and padded must have shapes (B, R, Hq, Wq) and (B, R, H + 2 p, W + 2 p), got '
            f'{tuple(query.shape)} and {tuple(padded.shape)}'
        )
    reach = (kernel_size - 1) * dilation
    size = tuple(max(0, n - reach) for n in padded.shape[2:])
    expected = (*padded.shape[:2], *((n + stride - 1) // stride for n in size))
    check_shape('query', query, expected, f'padded of shape {tuple(padded.shape)}')
    inputs = query.size(1) * (1 + kernel_size**2)
    for name, vector in (('mean', mean), ('factor', factor), ('shift', shift)):
        check_shape(name, vector, (inputs,), f'query of shape {tuple(query.shape)}')
    if weight.dim() != 2 or weight.size(0) != inputs or weight.size(1) < 1:
        raise ValueError(f'weight must have shape ({inputs}, O), got {tuple(weight.shape)}')
