"""Grouped convolution of few channels a group, in Triton: float32, bfloat16 and float16.

A program computes a tile of pixels of one group as a sum of matrix products, a product for each tap
of the kernel: pixels by input channels times input channels by output channels, both rounded up to
what matrix instructions take. What one program reads besides its group's channels, of a pixel that
has the channels of all groups adjacent, programs of the next groups find in the cache: they come
next. Maps of any strides are taken as they are; they are read fast where channels or columns are
adjacent.

The gradient of the input is the same kernel, which then looks for the results that a pixel went
into. The gradient of the weight is summed by several programs, each of some tiles, and their sums
are added up in order: nothing depends on the order of programs. Sums are float32's.

No product takes channels of two groups, so a NaN or infinity stays within its neighbourhood.
"""

import inspect

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._autograd import register_bilinear
from .._checks import check_dtypes, check_positive, check_shape, strided_size
from .triton_backend import _precision, address, make_operator, on_device, wrap_triton
from .triton_kernels import _dot, _offset

# Read off compilations (tools/dev/triton_report.py), not measured: nothing spills.
# Rows and columns of a tile, and, by the bytes of a number, for the gradient of the weight.
TILE = (8, 16)
WEIGHT_TILES = {2: (4, 16), 4: (4, 8)}
# Channels of a group in a product, at most: of more, there are several.
LARGEST_BLOCK = 32
# Kernel positions times channels that a program of the gradient of the weight takes.
COLUMNS = 64
# Programs of that which are enough for a GPU.
ENOUGH_PROGRAMS = 1024


def _jit(function):
    """``triton.jit`` that knows of strides of channels and columns whether they are 1, no more."""
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.annotation is not tl.constexpr]
    kept = [name for name in names if name.endswith(('_c', '_x'))]
    rest = [name for name in names if name not in kept]
    return triton.jit(function, do_not_specialize=rest, do_not_specialize_on_alignment=kept)


@triton.jit
def _tile(tile, height, width, TILE_Y: tl.constexpr, TILE_X: tl.constexpr):
    """Batch and pixels (TILE_Y * TILE_X,) of a tile, some beyond the map."""
    tiles_x = tl.cdiv(width, TILE_X)
    tiles = tiles_x * tl.cdiv(height, TILE_Y)
    p = tl.arange(0, TILE_Y * TILE_X)
    y = tile % tiles // tiles_x * TILE_Y + p // TILE_X
    x = tile % tiles_x * TILE_X + p % TILE_X
    return (tile // tiles).to(tl.int64), y, x


@triton.jit
def _addresses(
    maps, y, x, channel, stride_c, stride_y, stride_x, WIDE: tl.constexpr, ALIGN: tl.constexpr
):
    """Of pixels and channels, which broadcast; WIDE, where 32 bits do not hold offsets."""
    pixels = maps + _offset(y, x, stride_y, stride_x, WIDE)
    pixels = tl.multiple_of(pixels, (ALIGN, ALIGN))
    if WIDE:
        channel = channel.to(tl.int64)
    return pixels + channel * stride_c


@_jit
def convolve_kernel(
    maps, weight, bias, result,
    maps_b, maps_c, maps_y, maps_x,
    weight_o, weight_i, weight_y, weight_k,
    result_b, result_c, result_y, result_x,
    groups, height, width, result_height, result_width, dilation,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, WIDE: tl.constexpr,
    MAPS_ALIGN: tl.constexpr, RESULT_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """A tile of the result, of BLOCK_O of a group's OUTPUTS channels.

    TRANSPOSED, of the gradient of the input: ``maps`` is the gradient of the result, and a pixel
    takes from all that it went into.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    BLOCKS_I: tl.constexpr = (INPUTS + BLOCK_I - 1) // BLOCK_I
    BLOCKS_O: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    o = pid % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    group = (pid // BLOCKS_O % groups).to(tl.int64)
    batch, y, x = _tile(pid // BLOCKS_O // groups, result_height, result_width, TILE_Y, TILE_X)
    maps += batch * maps_b + group * INPUTS * maps_c
    result += batch * result_b + group * OUTPUTS * result_c
    if TRANSPOSED:
        weight += group * INPUTS * weight_i
    else:
        weight += group * OUTPUTS * weight_o

    acc = tl.zeros([TILE_Y * TILE_X, BLOCK_O], tl.float32)
    for step in range(KERNEL_SIZE * KERNEL_SIZE * BLOCKS_I):
        tap = step // BLOCKS_I
        i = step % BLOCKS_I * BLOCK_I + tl.arange(0, BLOCK_I)
        tap_y, tap_x = tap // KERNEL_SIZE, tap % KERNEL_SIZE
        if TRANSPOSED:
            at_y = y - (tap_y - RADIUS) * dilation
            at_x = x - (tap_x - RADIUS) * dilation
            inside = (at_y >= 0) & (at_x >= 0) & (at_y % STRIDE == 0) & (at_x % STRIDE == 0)
            at_y = at_y // STRIDE
            at_x = at_x // STRIDE
        else:
            at_y = y * STRIDE + (tap_y - RADIUS) * dilation
            at_x = x * STRIDE + (tap_x - RADIUS) * dilation
            inside = (at_y >= 0) & (at_x >= 0)
        inside &= (at_y < height) & (at_x < width)
        addresses = _addresses(
            maps, at_y[:, None], at_x[:, None], i[None, :], maps_c, maps_y, maps_x, WIDE, MAPS_ALIGN
        )
        a = tl.load(addresses, mask=inside[:, None] & (i < INPUTS)[None, :], other=0)
        addresses = weight + tap_y * weight_y + tap_x * weight_k
        addresses += i[:, None] * weight_i + o[None, :] * weight_o
        w = tl.load(addresses, mask=(i < INPUTS)[:, None] & (o < OUTPUTS)[None, :], other=0)
        acc += _dot(a, w, PRECISION)

    real = o < OUTPUTS
    if bias is not None:
        acc += tl.load(bias + group * OUTPUTS + o, mask=real, other=0).to(tl.float32)[None, :]
    addresses = _addresses(
        result, y[:, None], x[:, None], o[None, :], result_c, result_y, result_x, WIDE, RESULT_ALIGN
    )
    exists = (y < result_height) & (x < result_width)
    tl.store(addresses, acc.to(result.dtype.element_ty), mask=exists[:, None] & real[None, :])


@_jit
def grad_weight_kernel(
    grad, maps, sums,
    grad_b, grad_c, grad_y, grad_x,
    maps_b, maps_c, maps_y, maps_x,
    tiles, splits, groups, height, width, grad_height, grad_width, dilation,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, TAPS: tl.constexpr, WIDE: tl.constexpr,
    GRAD_ALIGN: tl.constexpr, MAPS_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """Of every ``splits``-th tile, what TAPS positions of a group's kernels have of it.

    ``sums`` has the shape (splits, C, INPUTS, KERNEL_SIZE ** 2).
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    ALL_TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    BLOCKS_T: tl.constexpr = (ALL_TAPS + TAPS - 1) // TAPS
    BLOCKS_I: tl.constexpr = (INPUTS + BLOCK_I - 1) // BLOCK_I
    BLOCKS_O: tl.constexpr = (OUTPUTS + BLOCK_O - 1) // BLOCK_O
    pid = tl.program_id(0)
    o = pid % BLOCKS_O * BLOCK_O + tl.arange(0, BLOCK_O)
    pid = pid // BLOCKS_O
    k = tl.arange(0, TAPS * BLOCK_I)
    i = pid % BLOCKS_I * BLOCK_I + k % BLOCK_I
    pid = pid // BLOCKS_I
    group = (pid % groups).to(tl.int64)
    pid = pid // groups
    tap = pid % BLOCKS_T * TAPS + k // BLOCK_I
    split = pid // BLOCKS_T
    grad += group * OUTPUTS * grad_c
    maps += group * INPUTS * maps_c
    shift_y = (tap // KERNEL_SIZE - RADIUS) * dilation
    shift_x = (tap % KERNEL_SIZE - RADIUS) * dilation
    real_i = (i < INPUTS) & (tap < ALL_TAPS)
    real_o = o < OUTPUTS

    acc = tl.zeros([TAPS * BLOCK_I, BLOCK_O], tl.float32)
    for tile in range(split, tiles, splits):
        batch, y, x = _tile(tile, grad_height, grad_width, TILE_Y, TILE_X)
        exists = (y < grad_height) & (x < grad_width)
        at_y = y[:, None] * STRIDE + shift_y[None, :]
        at_x = x[:, None] * STRIDE + shift_x[None, :]
        inside = (at_y >= 0) & (at_x >= 0) & (at_y < height) & (at_x < width)
        addresses = _addresses(
            maps + batch * maps_b, at_y, at_x, i[None, :], maps_c, maps_y, maps_x, WIDE, MAPS_ALIGN
        )
        a = tl.load(addresses, mask=inside & exists[:, None] & real_i[None, :], other=0)
        addresses = _addresses(
            grad + batch * grad_b, y[:, None], x[:, None], o[None, :],
            grad_c, grad_y, grad_x, WIDE, GRAD_ALIGN,
        )  # fmt: skip
        g = tl.load(addresses, mask=exists[:, None] & real_o[None, :], other=0)
        acc += _dot(tl.trans(a), g, PRECISION)

    place = (split * groups + group) * OUTPUTS
    place = ((place + o)[None, :] * INPUTS + i[:, None]) * ALL_TAPS + tap[:, None]
    tl.store(sums + place, acc, mask=real_i[:, None] & real_o[None, :])


def empty_maps(like: Tensor, batch: int, channels: int, size: tuple[int, int]) -> Tensor:
    """A new tensor of that shape, in memory with channels last where those of ``like`` are."""
    shape, last = (batch, channels, *size), like.stride(1) == 1 and like.size(1) > 1
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def alignment(maps: Tensor, groups: int) -> int:
    """Bytes, 16 at most, at multiples of which every pixel of every group starts."""
    strides = [s for n, s in zip(maps.shape, maps.stride(), strict=True) if n > 1 and s != 1]
    strides.append(maps.stride(1) * maps.size(1) // groups)
    starts = [address(maps), *(s * maps.element_size() for s in strides)]
    # Not the greatest common divisor, which would tie a compiled graph to one size.
    return next(n for n in (16, 8, 4, 2, 1) if all(start % n == 0 for start in starts))


def beyond_32_bits(*tensors: Tensor) -> bool:
    """Whether offsets within an image are beyond 32 bits."""
    return any(
        sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) >= 2**31
        for t in tensors
    )


def _block(channels: int, least: int, most: int = LARGEST_BLOCK) -> int:
    return min(most, max(least, triton.next_power_of_2(channels)))


def _tiles(maps: Tensor, tile: tuple[int, int]) -> int:
    batch, _, height, width = maps.shape
    return batch * triton.cdiv(height, tile[0]) * triton.cdiv(width, tile[1])


def _steps(size: tuple[int, int], stride: int, dilation: int) -> tuple[int, int]:
    """The same, small enough for 32 bits: all that lead out of the map are alike."""
    return min(stride, max(size)), min(dilation, max(size))


def _convolve(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    result: Tensor,
    stride: int,
    dilation: int,
    groups: int,
    transposed: bool,
) -> None:
    inputs, outputs = maps.size(1) // groups, result.size(1) // groups
    blocks = _block(inputs, 16), _block(outputs, 8)
    strides = weight.stride()
    if transposed:
        strides = (strides[1], strides[0], *strides[2:])
    grid = (_tiles(result, TILE) * groups * triton.cdiv(outputs, blocks[1]),)
    with on_device(maps):
        wrap_triton(convolve_kernel)[grid](
            *(maps, weight, bias, result),
            *(*maps.stride(), *strides, *result.stride()),
            *(groups, *maps.shape[2:], *result.shape[2:], dilation),
            INPUTS=inputs,
            OUTPUTS=outputs,
            KERNEL_SIZE=weight.size(2),
            STRIDE=stride,
            TRANSPOSED=transposed,
            BLOCK_I=blocks[0],
            BLOCK_O=blocks[1],
            WIDE=beyond_32_bits(maps, result),
            MAPS_ALIGN=alignment(maps, groups),
            RESULT_ALIGN=alignment(result, groups),
            PRECISION=_precision(maps.dtype),
            TILE_Y=TILE[0],
            TILE_X=TILE[1],
        )


def check_size(height: int, width: int) -> None:
    """Numbers that may be symbols."""
    if height < 1 or width < 1:
        raise ValueError(f'height and width must be positive, got {height} and {width}')


def _check(
    maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> None:
    """Of calls without the front's checks: kernels take sizes and strides at their word."""
    for name, value in (('stride', stride), ('dilation', dilation), ('groups', groups)):
        check_positive(name, value)
    check_dtypes(input=maps, weight=weight, bias=bias)
    square = weight.dim() == 4 and weight.size(2) == weight.size(3) and weight.size(3) % 2 == 1
    if maps.dim() != 4 or min(maps.shape[1:]) < 1 or maps.size(1) % groups:
        raise ValueError(
            f'input must have shape (B, C, H, W), C a multiple of {groups}, got {tuple(maps.shape)}'
        )
    fits = square and weight.size(1) * groups == maps.size(1)
    if not fits or weight.size(0) < 1 or weight.size(0) % groups:
        raise ValueError(
            f'weight must have shape (C, {maps.size(1) // groups}, k, k), C a multiple of '
            f'{groups}, k odd, got {tuple(weight.shape)}'
        )
    if bias is not None:
        check_shape('bias', bias, (weight.size(0),), f'weight of shape {tuple(weight.shape)}')


@make_operator('acmix_mm::group_conv_triton', mutates_args=())
def group_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> Tensor:
    """Grouped convolution with square odd kernels and zero padding that keeps the size at stride 1.

    As :func:`torch.nn.functional.conv2d` with ``padding = k // 2 * dilation``. It may be
    differentiated any number of times. Channels of the result are last in memory where those of the
    input, (B, C, H, W), are. Memory beyond inputs and results: for the gradient of the weight,
    partial sums in float32.
    """
    _check(input, weight, bias, stride, dilation, groups)
    result = empty_maps(input, input.size(0), weight.size(0), strided_size(input, stride))
    if result.numel():
        bias = None if bias is None else bias.contiguous()
        steps = _steps(input.shape[2:], stride, dilation)
        _convolve(input, weight, bias, result, *steps, groups, transposed=False)
    return result


@group_conv.register_fake
def _(input, weight, bias, stride, dilation, groups):
    return empty_maps(input, input.size(0), weight.size(0), strided_size(input, stride))


@make_operator('acmix_mm::group_conv_triton_grad_input', mutates_args=())
def _grad_input(
    grad: Tensor, weight: Tensor, height: int, width: int, stride: int, dilation: int, groups: int
) -> Tensor:
    check_positive('groups', groups)
    check_size(height, width)
    result = empty_maps(grad, grad.size(0), weight.size(1) * groups, (height, width))
    _check(result, weight, None, stride, dilation, groups)
    _check_grad(grad, result, weight.size(0), stride)
    check_dtypes(grad=grad, weight=weight)
    if result.numel():
        steps = _steps((height, width), stride, dilation)
        _convolve(grad, weight, None, result, *steps, groups, transposed=True)
    return result


@_grad_input.register_fake
def _(grad, weight, height, width, stride, dilation, groups):
    return empty_maps(grad, grad.size(0), weight.size(1) * groups, (height, width))


@make_operator('acmix_mm::group_conv_triton_grad_weight', mutates_args=())
def _grad_weight(
    grad: Tensor, input: Tensor, kernel_size: int, stride: int, dilation: int, groups: int
) -> Tensor:
    check_positive('kernel_size', kernel_size, odd=True)
    check_positive('groups', groups)
    result = _empty_weight(grad, input, kernel_size, groups)
    _check(input, result, None, stride, dilation, groups)
    _check_grad(grad, input, grad.size(1), stride)
    check_dtypes(grad=grad, input=input)
    if grad.numel() == 0:
        return result.zero_()
    stride, dilation = _steps(input.shape[2:], stride, dilation)
    outputs, inputs = (t.size(1) // groups for t in (grad, input))
    blocks = _block(inputs, 16), _block(outputs, 8)
    taps = COLUMNS // blocks[0]
    tile = WEIGHT_TILES[grad.element_size()]
    tiles = _tiles(grad, tile)
    programs = groups * triton.cdiv(inputs, blocks[0]) * triton.cdiv(outputs, blocks[1])
    programs *= triton.cdiv(kernel_size**2, taps)
    splits = min(tiles, triton.cdiv(ENOUGH_PROGRAMS, programs))
    sums = grad.new_empty((splits, *result.shape), dtype=torch.float32)
    with on_device(grad):
        wrap_triton(grad_weight_kernel)[(splits * programs,)](
            *(grad, input, sums),
            *(*grad.stride(), *input.stride()),
            *(tiles, splits, groups, *input.shape[2:], *grad.shape[2:], dilation),
            INPUTS=inputs,
            OUTPUTS=outputs,
            KERNEL_SIZE=kernel_size,
            STRIDE=stride,
            BLOCK_I=blocks[0],
            BLOCK_O=blocks[1],
            TAPS=taps,
            WIDE=beyond_32_bits(grad, input),
            GRAD_ALIGN=alignment(grad, groups),
            MAPS_ALIGN=alignment(input, groups),
            PRECISION=_precision(grad.dtype),
            TILE_Y=tile[0],
            TILE_X=tile[1],
        )
    return torch.sum(sums, 0, dtype=torch.float32).to(result.dtype)


def _empty_weight(grad: Tensor, input: Tensor, kernel_size: int, groups: int) -> Tensor:
    shape = (grad.size(1), input.size(1) // groups, kernel_size, kernel_size)
    return grad.new_empty(shape)


@_grad_weight.register_fake
def _(grad, input, kernel_size, stride, dilation, groups):
    return _empty_weight(grad, input, kernel_size, groups)


def _check_grad(grad: Tensor, maps: Tensor, channels: int, stride: int) -> None:
    expected = (maps.size(0), channels, *strided_size(maps, stride))
    check_shape('grad', grad, expected, f'input of shape {tuple(maps.shape)} and stride {stride}')


register_bilinear(
    ('group_conv_triton', 'group_conv_triton_grad_input', 'group_conv_triton_grad_weight'),
    3,
    lambda input, weight, options: group_conv(input, weight, None, *options),
    lambda grad, weight, input, options: _grad_input(grad, weight, *input.shape[2:], *options),
    lambda grad, input, weight, options: _grad_weight(grad, input, weight.size(-1), *options),
)
