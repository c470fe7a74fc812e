"""Weights of patchwise attention, in Triton: float32, bfloat16 and float16.

A program computes a tile of pixels as a sum of matrix products: for the query and each position of
the patch, pixels by channels, which are normalised and rectified on the way, times channels by
outputs. The backward pass does that anew. Of the maps, a program has a tile of pixels, and looks
for the results that they went into; of weight and norm, it has some inputs of the convolution and
sums over some tiles, and such sums are added up in order. Nothing of the patch's size exists
outside registers. Sums are float32's, in one order always.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._autograd import refuse_second_order
from .._checks import check_dtypes, check_geometry, check_shape
from .triton_backend import _precision, make_operator, on_device, wrap_triton
from .triton_group_conv import (
    ENOUGH_PROGRAMS,
    _addresses,
    _block,
    _jit,
    _tile,
    _tiles,
    alignment,
    beyond_32_bits,
    empty_maps,
)
from .triton_kernels import _dot

# Rows and columns of a tile, of the backward pass by the bytes of a number, and channels and
# outputs of a product, at most. The backward pass needs all outputs at once. Read off compilations
# (tools/dev/triton_report.py), not measured: nothing spills.
TILE = (8, 8)
BACKWARD_TILES = {2: (8, 8), 4: (4, 8)}
LARGEST_CHANNELS = 32
BACKWARD_CHANNELS = 16
LARGEST_OUTPUTS = 64


@triton.jit
def _normalised(x, inputs, real, mean, factor, shift):
    """Of pixels by channels ``x``: less the mean, and the norm's result, in float32."""
    m = tl.load(mean + inputs, mask=real, other=0).to(tl.float32)
    f = tl.load(factor + inputs, mask=real, other=0).to(tl.float32)
    s = tl.load(shift + inputs, mask=real, other=0).to(tl.float32)
    centred = x.to(tl.float32) - m[None, :]
    return centred, centred * f[None, :] + s[None, :], f


@triton.jit
def _product(
    x, inputs, real, o, mean, factor, shift, weight, weight_i, weight_o,
    OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of pixels by channels ``x``, normalised and rectified, with their rows of the weight."""
    _, a, _ = _normalised(x, inputs, real, mean, factor, shift)
    a = tl.where(a < 0, 0, a).to(x.dtype)  # a NaN stays one
    rows = weight + inputs[:, None] * weight_i + o[None, :] * weight_o
    w = tl.load(rows, mask=real[:, None] & (o < OUTPUTS)[None, :], other=0)
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
            q, c, c < CHANNELS, o, mean, factor, shift, weight, weight_i, weight_o,
            OUTPUTS, PRECISION,
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
            k, CHANNELS + c * POSITIONS + position, c < CHANNELS, o, mean, factor, shift,
            weight, weight_i, weight_o, OUTPUTS, PRECISION,
        )  # fmt: skip
    addresses = _addresses(
        result, y[:, None], x[:, None], o[None, :], result_c, result_y, result_x, WIDE, RESULT_ALIGN
    )
    mask = exists[:, None] & (o < OUTPUTS)[None, :]
    tl.store(addresses, acc.to(result.dtype.element_ty), mask=mask)


# For the backward pass, a query is a patch of one position. FIRST is the input of the convolution
# that is the first channel at the first position.


@_jit
def grad_maps_kernel(
    maps, mean, factor, shift, weight, grad, result,
    maps_b, maps_c, maps_y, maps_x,
    weight_i, weight_o,
    grad_b, grad_c, grad_y, grad_x,
    result_b, result_c, result_y, result_x,
    maps_height, maps_width, height, width, dilation,
    FIRST: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, WIDE: tl.constexpr,
    MAPS_ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr, RESULT_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """A tile of pixels of the maps, BLOCK_C of their channels."""
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    POSITIONS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    pid = tl.program_id(0)
    c = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    o = tl.arange(0, BLOCK_O)
    batch, y, x = _tile(pid // BLOCKS_C, maps_height, maps_width, TILE_Y, TILE_X)
    grad += batch * grad_b
    real = c < CHANNELS
    exists = (y < maps_height) & (x < maps_width)
    mask = exists[:, None] & real[None, :]
    own = _addresses(
        maps + batch * maps_b, y[:, None], x[:, None], c[None, :],
        maps_c, maps_y, maps_x, WIDE, MAPS_ALIGN,
    )  # fmt: skip
    values = tl.load(own, mask=mask, other=0)
    acc = tl.zeros([TILE_Y * TILE_X, BLOCK_C], tl.float32)
    for position in range(POSITIONS):
        at_y = y - position // KERNEL_SIZE * dilation
        at_x = x - position % KERNEL_SIZE * dilation
        inside = (at_y >= 0) & (at_x >= 0) & (at_y % STRIDE == 0) & (at_x % STRIDE == 0)
        at_y = at_y // STRIDE
        at_x = at_x // STRIDE
        inside &= (at_y < height) & (at_x < width)
        grads = _addresses(
            grad, at_y[:, None], at_x[:, None], o[None, :], grad_c, grad_y, grad_x, WIDE, GRAD_ALIGN
        )
        g = tl.load(grads, mask=inside[:, None] & (o < OUTPUTS)[None, :], other=0)
        inputs = FIRST + c * POSITIONS + position
        columns = weight + inputs[None, :] * weight_i + o[:, None] * weight_o
        w = tl.load(columns, mask=(o < OUTPUTS)[:, None] & real[None, :], other=0)
        _, z, f = _normalised(values, inputs, real, mean, factor, shift)
        grad_z = _dot(g, w.to(g.dtype), PRECISION)
        acc += tl.where((z <= 0) | (inside == 0)[:, None], 0, grad_z * f[None, :])
    written = _addresses(
        result + batch * result_b, y[:, None], x[:, None], c[None, :],
        result_c, result_y, result_x, WIDE, RESULT_ALIGN,
    )  # fmt: skip
    tl.store(written, acc.to(result.dtype.element_ty), mask=mask)


@_jit
def grad_parameters_kernel(
    maps, mean, factor, shift, weight, grad, sums,
    maps_b, maps_c, maps_y, maps_x,
    weight_i, weight_o,
    grad_b, grad_c, grad_y, grad_x,
    tiles, splits, all_inputs, height, width, dilation,
    FIRST: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, WIDE: tl.constexpr,
    MAPS_ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Of every ``splits``-th tile of results, what BLOCK_C inputs at one position have of it.

    ``sums``, (splits, all inputs, OUTPUTS + 2), get the gradients of the weight and, beside them,
    of factor and shift.
    """
    BLOCKS_C: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    POSITIONS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    pid = tl.program_id(0)
    c = pid % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    position = pid // BLOCKS_C % POSITIONS
    split = pid // BLOCKS_C // POSITIONS
    o = tl.arange(0, BLOCK_O)
    real = c < CHANNELS
    inputs = FIRST + c * POSITIONS + position
    columns = weight + inputs[None, :] * weight_i + o[:, None] * weight_o
    w = tl.load(columns, mask=(o < OUTPUTS)[:, None] & real[None, :], other=0)
    w = w.to(grad.dtype.element_ty)
    acc = tl.zeros([BLOCK_C, BLOCK_O], tl.float32)
    acc_factor = tl.zeros([BLOCK_C], tl.float32)
    acc_shift = tl.zeros([BLOCK_C], tl.float32)
    for tile in range(split, tiles, splits):
        batch, y, x = _tile(tile, height, width, TILE_Y, TILE_X)
        exists = (y < height) & (x < width)
        at_y = y * STRIDE + position // KERNEL_SIZE * dilation
        at_x = x * STRIDE + position % KERNEL_SIZE * dilation
        addresses = _addresses(
            maps + batch * maps_b, at_y[:, None], at_x[:, None], c[None, :],
            maps_c, maps_y, maps_x, WIDE, MAPS_ALIGN,
        )  # fmt: skip
        values = tl.load(addresses, mask=exists[:, None] & real[None, :], other=0)
        addresses = _addresses(
            grad + batch * grad_b, y[:, None], x[:, None], o[None, :],
            grad_c, grad_y, grad_x, WIDE, GRAD_ALIGN,
        )  # fmt: skip
        g = tl.load(addresses, mask=exists[:, None] & (o < OUTPUTS)[None, :], other=0)
        centred, z, _ = _normalised(values, inputs, real, mean, factor, shift)
        a = tl.where(z < 0, 0, z).to(g.dtype)
        acc += _dot(tl.trans(a), g, PRECISION)
        grad_z = tl.where(z <= 0, 0, _dot(g, w, PRECISION))
        acc_factor += tl.sum(grad_z * centred, 0)
        acc_shift += tl.sum(grad_z, 0)
    rows = sums + (split.to(tl.int64) * all_inputs + inputs) * (OUTPUTS + 2)
    tl.store(rows[:, None] + o[None, :], acc, mask=real[:, None] & (o < OUTPUTS)[None, :])
    tl.store(rows + OUTPUTS, acc_factor, mask=real)
    tl.store(rows + OUTPUTS + 1, acc_shift, mask=real)


@make_operator('acmix_mm::patch_weights_triton', mutates_args=())
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
    """Arguments and result as of :func:`.native_backend.patch_weights`.

    Gradients are for at most LARGEST_OUTPUTS outputs. Maps of any strides are taken as they are;
    channels of the result are last in memory where the query's are. Training keeps the arguments.
    Memory beyond results: for the gradients of weight and norm, partial sums in float32.
    """
    _check(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation)
    result = empty_maps(query, query.size(0), weight.size(1), query.shape[2:])
    if result.numel() == 0:
        return result
    channels, outputs = query.size(1), weight.size(1)
    block = _block(outputs, 8, LARGEST_OUTPUTS)
    grid = (_tiles(query, TILE) * triton.cdiv(outputs, block),)
    vectors = (t.contiguous() for t in (mean, factor, shift))
    with on_device(query):
        wrap_triton(patch_weights_kernel)[grid](
            *(query, padded, *vectors, weight, result),
            *(*query.stride(), *padded.stride(), *weight.stride(), *result.stride()),
            *(*query.shape[2:], dilation),
            CHANNELS=channels,
            OUTPUTS=outputs,
            KERNEL_SIZE=kernel_size,
            STRIDE=min(stride, max(padded.shape[2:])),
            BLOCK_C=_block(channels, 16, LARGEST_CHANNELS),
            BLOCK_O=block,
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


@make_operator('acmix_mm::patch_weights_triton_backward', mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    padded: Tensor,
    mean: Tensor,
    factor: Tensor,
    shift: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, padded, factor, shift and weight."""
    _check(query, padded, mean, factor, shift, weight, kernel_size, stride, dilation)
    outputs = weight.size(1)
    expected = (query.size(0), outputs, *query.shape[2:])
    check_shape('grad', grad, expected, f'query of shape {tuple(query.shape)}')
    check_dtypes(query=query, grad=grad)
    if outputs > LARGEST_OUTPUTS:
        raise ValueError(f'weight must have at most {LARGEST_OUTPUTS} outputs, got {outputs}')
    maps = (query, padded)
    results = [empty_maps(t, *t.shape[:2], t.shape[2:]) for t in maps]
    if grad.numel() == 0:
        total = weight.new_zeros((weight.size(0), outputs + 2))
        results = [result.zero_() for result in results]
        return *results, *_split(total)
    vectors = [t.contiguous() for t in (mean, factor, shift)]
    channels, tile = query.size(1), BACKWARD_TILES[query.element_size()]
    blocks, tiles = triton.cdiv(channels, BACKWARD_CHANNELS), _tiles(grad, tile)
    programs = kernel_size**2 * blocks
    splits = min(tiles, triton.cdiv(ENOUGH_PROGRAMS, programs))
    sums = weight.new_empty((splits, weight.size(0), outputs + 2), dtype=torch.float32)
    geometries = (0, 1, 1, 1), (channels, kernel_size, min(stride, max(padded.shape[2:])), dilation)
    for x, result, (first, side, step, distance) in zip(maps, results, geometries, strict=True):
        constants = {
            'FIRST': first,
            'CHANNELS': channels,
            'OUTPUTS': outputs,
            'KERNEL_SIZE': side,
            'STRIDE': step,
            'BLOCK_C': BACKWARD_CHANNELS,
            'BLOCK_O': _block(outputs, 16, LARGEST_OUTPUTS),
            'WIDE': beyond_32_bits(x, grad, result),
            'MAPS_ALIGN': alignment(x, 1),
            'GRAD_ALIGN': alignment(grad, 1),
            'PRECISION': _precision(x.dtype),
            'TILE_Y': tile[0],
            'TILE_X': tile[1],
        }
        strides = (*x.stride(), *weight.stride(), *grad.stride())
        with on_device(x):
            wrap_triton(grad_maps_kernel)[(_tiles(x, tile) * blocks,)](
                *(x, *vectors, weight, grad, result),
                *(*strides, *result.stride()),
                *(*x.shape[2:], *grad.shape[2:], distance),
                **constants,
                RESULT_ALIGN=alignment(result, 1),
            )
            wrap_triton(grad_parameters_kernel)[(splits * side**2 * blocks,)](
                *(x, *vectors, weight, grad, sums),
                *strides,
                *(tiles, splits, weight.size(0), *grad.shape[2:], distance),
                **constants,
            )
    return *results, *_split(torch.sum(sums, 0).to(weight.dtype))


def _split(total: Tensor) -> Sequence[Tensor]:
    """Gradients of factor, shift and weight, each with memory of its own."""
    columns = total[:, -2], total[:, -1], total[:, :-2]
    return [column.clone(memory_format=torch.contiguous_format) for column in columns]


@_backward.register_fake
def _(grad, query, padded, mean, factor, shift, weight, kernel_size, stride, dilation):
    maps = [empty_maps(t, *t.shape[:2], t.shape[2:]) for t in (query, padded)]
    return *maps, *(t.new_empty(t.shape) for t in (factor, shift, weight))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.geometry = inputs[6:]


def _autograd_backward(ctx, grad):
    tensors = ctx.saved_tensors  # once: torch.utils.checkpoint computes them anew
    query, padded, factor, shift, weight = _backward(grad, *tensors, *ctx.geometry)
    mean = -shift * tensors[3]
    return query, padded, mean, factor, shift, weight, None, None, None


patch_weights.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_order('acmix_mm::patch_weights_triton_backward', 'patch_weights', 'triton')
