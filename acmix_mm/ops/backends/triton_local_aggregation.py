"""Sums of a neighbourhood's values by given weights, in Triton: float32, bfloat16 and float16.

A lane of a program is a pixel of a group of channels: it reads a weight once for all channels that
share it. Lanes next to each other are pixels next to each other or, where channels are last in
memory, groups. Borders are reflected when addresses are formed, so nothing is padded; the gradient
of a value is gathered from all results that saw the pixel or one of its mirror images, by the lane
that writes it. Sums are float32's, in one order always.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._autograd import register_bilinear
from .._checks import check_dtypes, check_geometry, check_positive, check_shape, strided_size
from .triton_backend import make_operator, on_device, wrap_triton
from .triton_group_conv import beyond_32_bits, check_size, empty_maps
from .triton_kernels import _jit, _offset, _reflect

# Read off compilations (tools/dev/triton_report.py), not measured: nothing spills.
LANES = 128  # of a program
SHARE = 16  # channels of a group at a time, at most
GROUPS = 16  # next to each other where channels are last, at most


@triton.jit
def _place(
    groups, share, height, width,
    GROUPS: tl.constexpr, SHARE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """This program's batch, and its lanes' groups, rows, columns, and whether they exist.

    Also the first of its channels of each group, and which of those it takes.
    """
    PIXELS: tl.constexpr = LANES // GROUPS
    pid = tl.program_id(0)
    tiles = tl.cdiv(height * width, PIXELS)
    pixel = pid % tiles * PIXELS + tl.arange(0, LANES) // GROUPS
    pid = pid // tiles
    blocks = tl.cdiv(groups, GROUPS)
    group = pid % blocks * GROUPS + tl.arange(0, LANES) % GROUPS
    pid = pid // blocks
    blocks = tl.cdiv(share, SHARE)
    member = pid % blocks * SHARE + tl.arange(0, SHARE)
    exists = (pixel < height * width) & (group < groups)
    return (pid // blocks).to(tl.int64), member, group, pixel // width, pixel % width, exists


@triton.jit
def _maps(maps, member, group, groups, y, x, stride_c, stride_y, stride_x, WIDE: tl.constexpr):
    """(members, lanes) addresses of the channels ``group + groups * member``."""
    channel = group[None, :] + groups * member[:, None]
    if WIDE:
        channel = channel.to(tl.int64)
    return maps + channel * stride_c + _offset(y, x, stride_y, stride_x, WIDE)[None, :]


@triton.jit
def _weights(weight, group, y, x, stride_g, stride_y, stride_x, WIDE: tl.constexpr):
    """(lanes,) addresses of the weights of the first position."""
    if WIDE:
        group = group.to(tl.int64)
    return weight + group * stride_g + _offset(y, x, stride_y, stride_x, WIDE)


@triton.jit
def _seen(
    tap, y, x, height, width, dilation_y, dilation_x,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, ZEROS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Which pixel a position of the neighbourhood of (y, x) is, and whether it is on the map."""
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    y = y * STRIDE + (tap // KERNEL_SIZE - RADIUS) * dilation_y
    x = x * STRIDE + (tap % KERNEL_SIZE - RADIUS) * dilation_x
    if ZEROS:
        return y, x, (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return _reflect(y, height, ONCE), _reflect(x, width, ONCE), y == y


@_jit
def forward_kernel(
    value, weight, result,
    value_b, value_c, value_y, value_x,
    weight_b, weight_g, weight_k, weight_y, weight_x,
    result_b, result_c, result_y, result_x,
    groups, share, height, width, result_height, result_width, dilation_y, dilation_x,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, ZEROS: tl.constexpr, ONCE: tl.constexpr,
    WIDE: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Weighted sums over the neighbourhoods."""
    batch, member, group, y, x, exists = _place(
        groups, share, result_height, result_width, GROUPS, SHARE, LANES
    )
    value += batch * value_b
    mask = (member < share)[:, None] & exists[None, :]
    weights = _weights(weight + batch * weight_b, group, y, x, weight_g, weight_y, weight_x, WIDE)
    acc = tl.zeros([SHARE, LANES], tl.float32)
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        at_y, at_x, inside = _seen(
            tap, y, x, height, width, dilation_y, dilation_x, KERNEL_SIZE, STRIDE, ZEROS, ONCE
        )
        values = _maps(value, member, group, groups, at_y, at_x, value_c, value_y, value_x, WIDE)
        v = tl.load(values, mask=mask & inside[None, :], other=0)
        w = tl.load(weights, mask=exists, other=0)
        acc += w.to(tl.float32)[None, :] * v.to(tl.float32)
        weights += weight_k
    result += batch * result_b
    results = _maps(result, member, group, groups, y, x, result_c, result_y, result_x, WIDE)
    tl.store(results, acc.to(result.dtype.element_ty), mask=mask)


@_jit
def grad_weight_kernel(
    grad, value, result,
    grad_b, grad_c, grad_y, grad_x,
    value_b, value_c, value_y, value_x,
    result_b, result_g, result_k, result_y, result_x,
    groups, share, height, width, grad_height, grad_width, dilation_y, dilation_x,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, ZEROS: tl.constexpr, ONCE: tl.constexpr,
    WIDE: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Products of gradients and values, summed over the channels of a group."""
    # All channels of a group, in one program.
    batch, member, group, y, x, exists = _place(
        groups, 1, grad_height, grad_width, GROUPS, SHARE, LANES
    )
    grad += batch * grad_b
    value += batch * value_b
    grads = _maps(grad, member, group, groups, y, x, grad_c, grad_y, grad_x, WIDE)
    mask = (member < share)[:, None] & exists[None, :]
    first = tl.load(grads, mask=mask, other=0).to(tl.float32)
    results = _weights(result + batch * result_b, group, y, x, result_g, result_y, result_x, WIDE)
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        at_y, at_x, inside = _seen(
            tap, y, x, height, width, dilation_y, dilation_x, KERNEL_SIZE, STRIDE, ZEROS, ONCE
        )
        values = _maps(value, member, group, groups, at_y, at_x, value_c, value_y, value_x, WIDE)
        v = tl.load(values, mask=mask & inside[None, :], other=0)
        total = tl.sum(first * v.to(tl.float32), 0)
        for start in range(SHARE, share, SHARE):
            more = start + member
            rest = (more < share)[:, None] & exists[None, :]
            grads = _maps(grad, more, group, groups, y, x, grad_c, grad_y, grad_x, WIDE)
            values = _maps(value, more, group, groups, at_y, at_x, value_c, value_y, value_x, WIDE)
            g = tl.load(grads, mask=rest, other=0).to(tl.float32)
            v = tl.load(values, mask=rest & inside[None, :], other=0)
            total += tl.sum(g * v.to(tl.float32), 0)
        tl.store(results, total.to(result.dtype.element_ty), mask=exists)
        results += result_k


@triton.jit
def _image(i, pixels, size, reach, last):
    """Where pixels have their i-th mirror image on an axis, and whether a neighbourhood sees it.

    Images of pixel p are at ``period * (i / 2) + p`` and, i odd, at ``period * ((i - 1) / 2) - p``;
    neighbourhoods reach from ``-reach`` to ``last``.
    """
    odd = i & 1
    period = tl.maximum(2 * size - 2, 1)
    at = (i - odd) // 2 * period + (1 - 2 * odd) * pixels
    # Border pixels have their odd images where they have even ones.
    again = (odd == 1) & (2 * pixels % period == 0)
    return at, (at >= -reach) & (at <= last) & (again == 0)


@_jit
def grad_value_kernel(
    grad, weight, result,
    grad_b, grad_c, grad_y, grad_x,
    weight_b, weight_g, weight_k, weight_y, weight_x,
    result_b, result_c, result_y, result_x,
    groups, share, height, width, grad_height, grad_width, dilation_y, dilation_x,
    first_y, end_y, first_x, end_x,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, WIDE: tl.constexpr,
    GROUPS: tl.constexpr, SHARE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Over a pixel's mirror images, of which the launch names those that may be seen."""
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    batch, member, group, y, x, exists = _place(groups, share, height, width, GROUPS, SHARE, LANES)
    grad += batch * grad_b
    weight += batch * weight_b
    real = (member < share)[:, None]
    reach_y, reach_x = RADIUS * dilation_y, RADIUS * dilation_x
    last_y = (grad_height - 1) * STRIDE + reach_y
    last_x = (grad_width - 1) * STRIDE + reach_x
    acc = tl.zeros([SHARE, LANES], tl.float32)
    for i in range(first_y, end_y):
        image_y, seen_y = _image(i, y, height, reach_y, last_y)
        seen_y &= exists
        any_y = tl.max(seen_y.to(tl.int32), 0)
        for j in range(first_x, tl.where(any_y > 0, end_x, first_x)):
            image_x, seen = _image(j, x, width, reach_x, last_x)
            seen &= seen_y
            any_x = tl.max(seen.to(tl.int32), 0)
            for tap in range(0, tl.where(any_x > 0, KERNEL_SIZE * KERNEL_SIZE, 0)):
                at_y = image_y - (tap // KERNEL_SIZE - RADIUS) * dilation_y
                at_x = image_x - (tap % KERNEL_SIZE - RADIUS) * dilation_x
                inside = seen & (at_y >= 0) & (at_x >= 0)
                inside &= (at_y % STRIDE == 0) & (at_x % STRIDE == 0)
                at_y = at_y // STRIDE
                at_x = at_x // STRIDE
                inside &= (at_y < grad_height) & (at_x < grad_width)
                weights = _weights(weight, group, at_y, at_x, weight_g, weight_y, weight_x, WIDE)
                w = tl.load(weights + tap * weight_k, mask=inside, other=0)
                grads = _maps(grad, member, group, groups, at_y, at_x, grad_c, grad_y, grad_x, WIDE)
                g = tl.load(grads, mask=real & inside[None, :], other=0)
                acc += w.to(tl.float32)[None, :] * g.to(tl.float32)
    result += batch * result_b
    results = _maps(result, member, group, groups, y, x, result_c, result_y, result_x, WIDE)
    tl.store(results, acc.to(result.dtype.element_ty), mask=real & exists[None, :])


class _Plan:
    """What all launches of a call share. ``maps`` decide what lanes next to each other are."""

    def __init__(
        self,
        maps: Tensor,
        groups: int,
        size: tuple[int, int],
        result_size: tuple[int, int],
        geometry: tuple[int, int, int],
        zeros: bool,
    ):
        kernel_size, stride, dilation = geometry
        # Reflection is periodic, and zeros are zeros: a large step is as good as a small one.
        self.dilations = [
            min(dilation, n) if zeros else (dilation - 1) % max(1, 2 * (n - 1)) + 1 for n in size
        ]
        self.stride = min(stride, max(size))
        self.size, self.result_size, self.zeros = size, result_size, zeros
        self.reaches = [kernel_size // 2 * d for d in self.dilations]
        self.batch, self.groups, self.share = maps.size(0), groups, maps.size(1) // groups
        last = maps.stride(1) == 1 and maps.size(1) > 1
        self.constants = {
            'KERNEL_SIZE': kernel_size,
            'STRIDE': self.stride,
            'GROUPS': min(GROUPS, triton.next_power_of_2(groups)) if last else 1,
            'SHARE': min(SHARE, triton.next_power_of_2(self.share)),
            'LANES': LANES,
        }

    @property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' arguments from ``groups`` on."""
        return self.groups, self.share, *self.size, *self.result_size, *self.dilations

    @property
    def border(self) -> dict[str, bool]:
        """ZEROS, and ONCE, where reflection at both ends once is enough."""
        once = all(n == 1 or r < n for n, r in zip(self.size, self.reaches, strict=True))
        return {'ZEROS': self.zeros, 'ONCE': once}

    @property
    def images(self) -> list[int]:
        """Of each axis, the range of mirror images that a neighbourhood may reach."""
        ends = []
        for n, out, reach in zip(self.size, self.result_size, self.reaches, strict=True):
            period = max(2 * n - 2, 1)
            first = -((reach + n - 1) // period)
            last = (self.stride * (out - 1) + reach + n - 1) // period
            ends += [0, 1] if self.zeros else [2 * first, 2 * last + 2]
        return ends

    def grid(self, size: tuple[int, int], share_blocks: bool = True) -> tuple[int]:
        """Programs for all lanes of maps of that size."""
        pixels = LANES // self.constants['GROUPS']
        programs = triton.cdiv(size[0] * size[1], pixels)
        programs *= triton.cdiv(self.groups, self.constants['GROUPS'])
        if share_blocks:
            programs *= triton.cdiv(self.share, self.constants['SHARE'])
        return (self.batch * programs,)


def _check(value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int) -> None:
    """Of calls without the front's checks: kernels take sizes and strides at their word."""
    check_geometry(kernel_size, stride, dilation)
    check_dtypes(value=value, weight=weight)
    if value.dim() != 4 or weight.dim() != 5 or min(value.shape[1:]) < 1:
        raise ValueError(
            'value and weight must have shapes (B, C, H, W) and (B, G, k * k, Hq, Wq), got '
            f'{tuple(value.shape)} and {tuple(weight.shape)}'
        )
    groups = weight.size(1)
    if groups < 1 or value.size(1) % groups:
        raise ValueError(f'weight must have groups that divide {value.size(1)}, got {groups}')
    expected = (value.size(0), groups, kernel_size**2, *strided_size(value, stride))
    check_shape('weight', weight, expected, f'value of shape {tuple(value.shape)}')


@make_operator('acmix_mm::local_aggregation_triton', mutates_args=())
def _forward(
    value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int, zeros: bool
) -> Tensor:
    _check(value, weight, kernel_size, stride, dilation)
    result = empty_maps(value, *value.shape[:2], weight.shape[3:])
    if result.numel() == 0:
        return result
    geometry = (kernel_size, stride, dilation)
    plan = _Plan(value, weight.size(1), value.shape[2:], result.shape[2:], geometry, zeros)
    with on_device(value):
        wrap_triton(forward_kernel)[plan.grid(plan.result_size)](
            *(value, weight, result),
            *(*value.stride(), *weight.stride(), *result.stride()),
            *plan.sizes,
            WIDE=beyond_32_bits(value, weight, result),
            **plan.constants,
            **plan.border,
        )
    return result


@_forward.register_fake
def _(value, weight, kernel_size, stride, dilation, zeros):
    return empty_maps(value, *value.shape[:2], weight.shape[3:])


@make_operator('acmix_mm::local_aggregation_triton_grad_value', mutates_args=())
def _grad_value(
    grad: Tensor,
    weight: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    zeros: bool,
) -> Tensor:
    check_size(height, width)
    result = empty_maps(grad, *grad.shape[:2], (height, width))
    _check(result, weight, kernel_size, stride, dilation)
    _check_grad(grad, result, stride)
    check_dtypes(grad=grad, weight=weight)
    if result.numel() == 0:
        return result
    geometry = (kernel_size, stride, dilation)
    plan = _Plan(grad, weight.size(1), result.shape[2:], grad.shape[2:], geometry, zeros)
    with on_device(grad):
        wrap_triton(grad_value_kernel)[plan.grid(plan.size)](
            *(grad, weight, result),
            *(*grad.stride(), *weight.stride(), *result.stride()),
            *plan.sizes,
            *plan.images,
            WIDE=beyond_32_bits(grad, weight, result),
            **plan.constants,
        )
    return result


@_grad_value.register_fake
def _(grad, weight, height, width, kernel_size, stride, dilation, zeros):
    return empty_maps(grad, *grad.shape[:2], (height, width))


@make_operator('acmix_mm::local_aggregation_triton_grad_weight', mutates_args=())
def _grad_weight(
    grad: Tensor,
    value: Tensor,
    groups: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    zeros: bool,
) -> Tensor:
    check_positive('groups', groups)
    check_positive('kernel_size', kernel_size, odd=True)
    result = _empty_weight(grad, groups, kernel_size)
    _check(value, result, kernel_size, stride, dilation)
    _check_grad(grad, value, stride)
    check_dtypes(grad=grad, value=value)
    if result.numel() == 0:
        return result
    geometry = (kernel_size, stride, dilation)
    plan = _Plan(grad, groups, value.shape[2:], grad.shape[2:], geometry, zeros)
    with on_device(grad):
        wrap_triton(grad_weight_kernel)[plan.grid(plan.result_size, share_blocks=False)](
            *(grad, value, result),
            *(*grad.stride(), *value.stride(), *result.stride()),
            *plan.sizes,
            WIDE=beyond_32_bits(grad, value, result),
            **plan.constants,
            **plan.border,
        )
    return result


def _empty_weight(grad: Tensor, groups: int, kernel_size: int) -> Tensor:
    channels = groups * kernel_size**2
    return empty_maps(grad, grad.size(0), channels, grad.shape[2:]).unflatten(1, (groups, -1))


@_grad_weight.register_fake
def _(grad, value, groups, kernel_size, stride, dilation, zeros):
    return _empty_weight(grad, groups, kernel_size)


def _check_grad(grad: Tensor, value: Tensor, stride: int) -> None:
    expected = (*value.shape[:2], *strided_size(value, stride))
    check_shape('grad', grad, expected, f'value of shape {tuple(value.shape)} and stride {stride}')


register_bilinear(
    (
        'local_aggregation_triton',
        'local_aggregation_triton_grad_value',
        'local_aggregation_triton_grad_weight',
    ),
    4,
    lambda value, weight, options: _forward(value, weight, *options),
    lambda grad, weight, value, options: _grad_value(grad, weight, *value.shape[2:], *options),
    lambda grad, value, weight, options: _grad_weight(grad, value, weight.size(1), *options),
)


def local_aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    padding_mode: str,
) -> Tensor:
    """Arguments, already checked, and result as in :func:`acmix_mm.ops.local_aggregation`.

    It may be differentiated any number of times, and needs no memory beyond its results. Maps of
    any strides are taken as they are; channels of the result are last in memory where the value's
    are.
    """
    return _forward(value, weight, kernel_size, stride, dilation, padding_mode == 'zeros')
