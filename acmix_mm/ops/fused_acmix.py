"""Both stages of ACmix as one operator.

The native backend has a kernel for it, with what the operators one by one cannot have: neither
``key - position`` nor the attention's result exist as maps of their own, the gradients of both
paths meet in one map without concatenations, and training saves the input instead of query, key and
value, which are projected anew in the backward pass. Half precision is computed in float32, a strip
of the maps at a time.

Triton's kernels of attention have the first of these: they take the position encoding off and add
the convolution's map. All else is PyTorch's there.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import refuse_second_order, spread
from ._checks import (
    check_dtypes,
    check_geometry,
    check_positive,
    check_shape,
    check_tensors,
    strided_size,
)
from ._dispatch import OPERATORS, Implementation, autocast_tensors, dispatch
from ._products import operand, product
from .backends import native_backend, triton_backend
from .group_conv import group_conv
from .local_attention import local_attention

# Of projected maps at a time, on the CPU: a share of its last-level cache.
STRIP_BYTES = 8 << 20


def fused_acmix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    scale: Tensor,
    num_heads: int,
    attn_kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """``scale * attention + convolution`` of ACmix (CVPR 2022, section 4).

    See :class:`acmix_mm.layers.ACmix` for what is computed. For N heads of dimension d:

    Args:
        x (Tensor): Shape (B, Cin, H, W).
        weight (Tensor): Shape (d * 3 * N, Cin, 1, 1), the projections, ordered as (position,
            query / key / value, head).
        bias (Tensor): Shape (d * 3 * N,), of the projections.
        slopes (Tensor): Shape (d, 2): the position encoding is ``slopes @ (x, y)`` for coordinates
            linspace(-1, 1) over width and height.
        kernel (Tensor): Shape (N * d, 3 * N, k, k), of the convolution path, with d groups.
        kernel_bias (Tensor | None): Shape (N * d,), of the same.
        scale (Tensor): Shape (1,) or (N * d,), on the attention path.
        num_heads (int): N.
        attn_kernel_size (int): Side of the attention's neighbourhood, odd. Default: 7.
        stride (int): Stride of both paths. Default: 1.
        dilation (int): Dilation of both paths. Default: 1.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; without a kernel of its
            own, a backend computes the operator by its attention and convolution. Default: None.

    Returns:
        Tensor: Shape (B, N * d, ceil(H / stride), ceil(W / stride)).

    Raises:
        TypeError: If a tensor is not one of floating-point numbers.
        ValueError: If an argument is not as described or not for ``backend``, or devices or dtypes
            do not fit together (those of slopes and scale may be others); the message names it.
    """
    check_positive('attn_kernel_size', attn_kernel_size, odd=True)
    check_geometry(attn_kernel_size, stride, dilation)
    check_positive('num_heads', num_heads)
    _check_tensors(x, weight, bias, slopes, kernel, kernel_bias, scale, num_heads)
    x, weight, bias, kernel, kernel_bias = autocast_tensors(x, weight, bias, kernel, kernel_bias)
    check_dtypes(x=x, weight=weight, bias=bias, kernel=kernel, kernel_bias=kernel_bias)
    tensors = (x, weight, bias, slopes, kernel, kernel_bias, scale)
    geometry = (num_heads, attn_kernel_size, stride, dilation)
    return dispatch('fused_acmix', backend, *tensors, *geometry)


def _check_tensors(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    scale: Tensor,
    num_heads: int,
) -> None:
    tensors = {'weight': weight, 'bias': bias, 'slopes': slopes, 'kernel': kernel, 'scale': scale}
    check_tensors(x=x, **tensors)
    if x.dim() != 4 or min(x.shape[1:]) < 1:
        raise ValueError(
            f'x must have shape (B, Cin, H, W) with Cin, H, W >= 1, got {tuple(x.shape)}'
        )
    if slopes.dim() != 2 or slopes.size(0) < 1 or slopes.size(1) != 2:
        raise ValueError(f'slopes must have shape (d, 2) with d >= 1, got {tuple(slopes.shape)}')
    channels = num_heads * slopes.size(0)
    why = f'num_heads {num_heads}, slopes of shape {tuple(slopes.shape)} and {x.size(1)} channels'
    side = kernel.size(-1) if kernel.dim() == 4 and kernel.size(-1) % 2 == 1 else 3
    shapes = {
        'weight': (3 * channels, x.size(1), 1, 1),
        'bias': (3 * channels,),
        'kernel': (channels, 3 * num_heads, side, side),
        'scale': (1,) if scale.numel() == 1 else (channels,),
    }
    for name, shape in shapes.items():
        check_shape(name, tensors[name], shape, why)
    if kernel_bias is not None:
        check_tensors(x=x, kernel_bias=kernel_bias)
        check_shape('kernel_bias', kernel_bias, (channels,), why)


def attention_path(
    maps: Tensor,
    slopes: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    backend: str | None,
) -> Tensor:
    """Attention of projected maps (B, d, 3, N, H, W), keys less the position encoding.

    Returns:
        Tensor: Shape (B, N * d, ceil(H / stride), ceil(W / stride)).
    """
    return _attend(*_split(maps, stride), slopes, kernel_size, stride, dilation, backend)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    backend: str | None,
) -> Tensor:
    """Attention (B, N * d, Hq, Wq) with keys less the position encoding."""
    key = key - position_encoding(slopes, key)
    geometry = (kernel_size, stride, dilation)
    return local_attention(query, key, value, *geometry, backend=backend).flatten(1, 2)


def position_encoding(slopes: Tensor, key: Tensor) -> Tensor:
    """(d, H, W): ``conv_p`` of the coordinates (x, y), linspace(-1, 1) over width and height.

    In the dtype and on the device of ``key`` (B, N, d, H, W).
    """
    height, width = key.shape[-2:]
    slope_x, slope_y = slopes[:, :, None, None].unbind(1)
    x, y = (_coordinates(size, slopes) for size in (width, height))
    return (slope_x * x + slope_y * y[:, None]).to(key.dtype)


def _coordinates(size: int, like: Tensor) -> Tensor:
    """linspace(-1, 1) over ``size`` pixels, which may be a symbol of torch.export."""
    pixels = torch.arange(size, device=like.device, dtype=like.dtype)
    return pixels * 2 / pixels[-1].clamp(min=1) - 1


def _project(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    return _projected_heads(F.conv2d(x, weight, bias), num_heads)


class _Strip(NamedTuple):
    """Images of a batch and rows of their maps that are worked off together.

    Output rows ``begin`` to ``end``, and the input rows ``first`` to ``last`` that they see, with
    some more up to multiples of the stride. Strips before it have seen rows up to ``fresh``, those
    after it see rows from ``done`` on.
    """

    images: slice
    begin: int
    end: int
    first: int
    last: int
    fresh: int
    done: int


def _strips(x: Tensor, channels: int, reach: int, stride: int) -> list[_Strip]:
    """Cut the work so that projected maps, of so many channels, stay in the processor's caches.

    Into some images each, or some rows of one. A row of the output sees ``reach`` rows of the input
    above and below.
    """
    batch, _, height, width = x.shape
    rows = STRIP_BYTES // max(channels * width * _sum_dtype(x).itemsize, 1)
    outputs = (height - 1) // stride + 1
    if rows >= height or height <= 6 * reach:
        images = max(rows // height, 1)
        return [
            _Strip(slice(i, i + images), 0, outputs, 0, height, 0, height)
            for i in range(0, batch, images)
        ]
    parts = -(-outputs // (max(rows - 2 * reach, 4 * reach) // stride + 1))
    edges = [outputs * i // parts for i in range(parts + 1)]
    firsts = [max(edge * stride - reach, 0) // stride * stride for edge in edges[:-1]]
    lasts = [min(((edge - 1) * stride + reach) // stride * stride + stride, height)
             for edge in edges[1:]]  # fmt: skip
    rows_of_strips = list(
        zip(edges, edges[1:], firsts, lasts, [0, *lasts], [*firsts[1:], height], strict=False)
    )
    return [_Strip(slice(i, i + 1), *rows) for i in range(batch) for rows in rows_of_strips]


def _projected_strips(
    x: Tensor,
    weight: Tensor,
    kernel: Tensor,
    num_heads: int,
    attn_kernel_size: int,
    stride: int,
    dilation: int,
    backward: bool = False,
) -> Iterator[tuple[_Strip, Tensor, Tensor | None]]:
    """Strips, their projected maps (B, 3 C, h, W), and room for the gradients of these.

    The latter where ``backward``: up to row ``fresh``, they are what the strips before have summed
    up. All is of the dtype of ``weight``, and overwritten when the next strip is asked for, which
    takes over the rows that it sees again: to move them is cheaper than to project them anew. Maps
    lack their bias, which whoever reads them adds: a pass over them less.
    """
    reach = max(attn_kernel_size, kernel.size(-1)) // 2 * dilation
    strips = _strips(x, weight.size(0), reach, stride)
    images = max((len(range(len(x))[s.images]) for s in strips), default=0)
    rows = max((s.last - s.first for s in strips), default=0)
    # Of a part of their rows, matrices of all images would be copies.
    merged = _merged(x) and all(s.last - s.first == x.size(2) for s in strips)

    def room() -> Tensor:
        if merged:
            return weight.new_empty((weight.size(0), images, rows, x.size(3))).movedim(0, 1)
        return weight.new_empty((images, weight.size(0), rows, x.size(3)))

    maps, sums = room(), room() if backward else None
    factor = weight.flatten(1).to(_product_dtype(x.dtype))
    for strip in strips:
        part = x[strip.images, :, strip.fresh : strip.last].to(factor.dtype)
        count, height = part.size(0), strip.last - strip.first
        projected = maps[:count, :, :height]
        fresh = projected[:, :, strip.fresh - strip.first :]
        for source, target in zip(_matrices(part, merged), _matrices(fresh, merged), strict=True):
            product(factor, source, target)
        yield strip, projected, None if sums is None else sums[:count, :, :height]
        kept = strip.last - strip.done
        if kept > 0:
            for held in (maps,) if sums is None else (maps, sums):
                rows = held[:, :, height - kept : height]
                held[:, :, :kept] = rows.clone() if 2 * kept > height else rows


def _merged(x: Tensor) -> bool:
    """Whether one product projects all images: where the products of each would be small."""
    return x.size(0) > 1 and x.size(2) * x.size(3) < 128


def _matrices(maps: Tensor, merged: bool) -> list[Tensor]:
    """(B, C, h, W) as matrices (C, pixels): one of all images, or one an image."""
    return [maps.movedim(1, 0).flatten(1)] if merged else [image.flatten(1) for image in maps]


def _biases(bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """The bias of query (N, d) and of value (N * d,).

    Those are all that attention feels: the key's adds the same to all logits of a query. The
    value's may be added to the result, of which it is the weighted mean.
    """
    query, _, value = bias.view(-1, 3, num_heads).permute(1, 2, 0)
    return query, value.flatten()


def _sum_dtype(x: Tensor) -> torch.dtype:
    """In which strips are worked off: that of ``x``, or float32 for half precision.

    The maps of a strip stay in caches, where smaller numbers would gain nothing.
    """
    return torch.promote_types(x.dtype, torch.float32)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which matrices of ``dtype`` are multiplied: half precision in float32, mostly.

    Not bfloat16 where the processor is faster at it: with AMX, or where AVX512_BF16 is fast.
    """
    if dtype == torch.bfloat16 and torch.ops.acmix_mm.native_bfloat16_products_pay():
        return dtype
    return torch.promote_types(dtype, torch.float32)


def _room_for(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Where ``rows`` are computed in ``dtype``, to be copied to them; of that dtype, themselves."""
    return rows if rows.dtype == dtype else torch.empty(rows.shape, dtype=dtype)


def _split(maps: Tensor, stride: int, strip: _Strip | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, d, 3, N, H, W) -> query, key and value (B, N, d, H, W), query subsampled."""
    query, key, value = maps.permute(2, 0, 3, 1, 4, 5)
    if strip is not None:
        query = query[..., strip.begin * stride - strip.first : strip.end * stride - strip.first, :]
    return query[..., ::stride, ::stride], key, value


def _by_parts(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    scale: Tensor,
    num_heads: int,
    attn_kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """The operator of PyTorch's attention and convolution."""
    maps = _project(x, weight, bias, num_heads)
    geometry = (stride, dilation)
    attention = attention_path(maps, slopes, attn_kernel_size, *geometry, 'torch')
    convolution = group_conv(maps.flatten(2, 3), kernel, *geometry, kernel_bias, 'torch')
    return torch.addcmul(convolution, attention, scale.to(attention.dtype).view(-1, 1, 1))


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    scale: Tensor,
    num_heads: int,
    attn_kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """The same with channels last, in which result comes back, and Triton's attention.

    Attention wants the channels of a head adjacent, the grouped convolution those of a head
    position. Projecting once for each reads x again; permuting maps would read and write three
    times as much. The position encoding and the sum of both paths are the attention kernel's.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    convolution = group_conv(
        _project(x, weight, bias, num_heads).flatten(2, 3),
        kernel, stride, dilation, kernel_bias, 'triton',
    )  # fmt: skip
    weights, biases = (
        t.unflatten(0, (-1, 3, num_heads)).movedim(0, 2).flatten(1, 2) for t in (weight, bias)
    )
    # With the stride in its convolution, only those queries are projected that attend.
    query = F.conv2d(x, weights[0], biases[0], stride).unflatten(1, (num_heads, -1))
    maps = F.conv2d(x, weights[1:].flatten(0, 1), biases[1:].flatten())
    key, value = maps.unflatten(1, (2, num_heads, -1)).unbind(1)
    return triton_backend.mixed_attention(
        query, key, value, slopes, _heads(convolution, num_heads), scale,
        attn_kernel_size, stride, dilation,
    ).flatten(1, 2)  # fmt: skip


def _heads(maps: Tensor, num_heads: int) -> Tensor:
    return maps.unflatten(1, (num_heads, -1))


def _projected_heads(maps: Tensor, num_heads: int) -> Tensor:
    """Projected maps (B, 3 C, h, W) as (B, d, 3, N, h, W)."""
    return maps.unflatten(1, (-1, 3, num_heads))


@torch.library.custom_op('acmix_mm::fused_acmix', mutates_args=(), device_types='cpu')
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    kernel: Tensor,
    kernel_bias: Tensor | None,
    scale: Tensor,
    num_heads: int,
    attn_kernel_size: int,
    stride: int,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    geometry = (num_heads, attn_kernel_size, stride, dilation)
    size = strided_size(x, stride)
    dtype = _sum_dtype(x)
    out = x.new_empty((x.size(0), kernel.size(0), *size))
    lse = x.new_empty((x.size(0), num_heads, *size), dtype=dtype)
    weight, bias, kernel = (t.to(dtype) for t in (weight, bias, kernel))
    scale = scale.expand(out.size(1))
    query_bias, value_bias = _biases(bias, num_heads)
    out_bias = (scale * value_bias).to(dtype)
    if kernel_bias is not None:
        out_bias += kernel_bias
    for strip, maps, _ in _projected_strips(x, weight, kernel, *geometry):
        where = (x.size(2), strip.begin, strip.first)
        out_rows, lse_rows = (t[strip.images, :, strip.begin : strip.end] for t in (out, lse))
        sums = _room_for(out_rows, dtype)
        torch.ops.acmix_mm.group_conv_native_rows_(
            sums, maps, bias, kernel, out_bias, stride, dilation, len(slopes), *where
        )
        query, *others = _split(_projected_heads(maps, num_heads), stride, strip)
        native_backend.local_attention_add_(
            _heads(sums, num_heads), lse_rows, query, query_bias, *others, slopes,
            scale.view(num_heads, -1), attn_kernel_size, stride, dilation, len(slopes) ** -0.5,
            *where,
        )  # fmt: skip
        out_rows.copy_(sums)
    return out, lse


@_forward.register_fake
def _(
    x, weight, bias, slopes, kernel, kernel_bias, scale, num_heads, attn_kernel_size, stride,
    dilation,
):  # fmt: skip
    size = strided_size(x, stride)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((x.size(0), kernel.size(0), *size)),
        x.new_empty((x.size(0), num_heads, *size), dtype=dtype),
    )


@torch.library.custom_op('acmix_mm::fused_acmix_backward', mutates_args=(), device_types='cpu')
@torch.autocast('cpu', enabled=False)  # or it casts the products of float32 strips
def _backward(
    grad: Tensor,
    lse: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    slopes: Tensor,
    kernel: Tensor,
    scale: Tensor,
    num_heads: int,
    attn_kernel_size: int,
    stride: int,
    dilation: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of x, weight, bias, slopes, kernel and scale that are ``needed``."""
    *of_projection, of_slopes, of_kernel, of_scale = needed
    one_scale = scale.numel() == 1
    dtype = _sum_dtype(x)
    inputs = (x, weight, bias, slopes, kernel, scale)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    grad_weight, grad_bias, grad_slopes, grad_kernel, grad_scale = sums = [
        torch.zeros(t.shape, dtype=torch.promote_types(dtype, t.dtype)) for t in inputs[1:]
    ]
    grad, weight, bias, kernel = (t.to(dtype) for t in (grad, weight, bias, kernel))
    grad = grad.contiguous()
    scaled = grad if one_scale else grad * scale.to(dtype).view(-1, 1, 1)
    geometry = (num_heads, attn_kernel_size, stride, dilation)
    query_bias, value_bias = _biases(bias, num_heads)
    for strip, maps, grad_maps in _projected_strips(x, weight, kernel, *geometry, backward=True):
        rows = slice(strip.begin, strip.end)
        where = (x.size(2), strip.begin, strip.first)
        query, *others = _split(_projected_heads(maps, num_heads), stride, strip)
        parts = (query, query_bias, *others)
        attention = (attn_kernel_size, stride, dilation, len(slopes) ** -0.5, *where)
        lse_rows = lse[strip.images, :, rows]
        if of_kernel:
            grad_kernel += torch.ops.acmix_mm.group_conv_native_grad_weight_rows(
                grad[strip.images, :, rows], maps, bias, kernel.size(-1), stride, dilation,
                len(slopes), *where,
            )  # fmt: skip
        if any(of_projection) or of_slopes or (of_scale and one_scale):
            fresh = grad_maps[:, :, strip.fresh - strip.first :]
            if any(of_projection):
                torch.ops.acmix_mm.group_conv_native_grad_input_rows_(
                    fresh, grad[strip.images], kernel, stride, dilation, len(slopes), x.size(2),
                    strip.fresh,
                )  # fmt: skip
            else:
                fresh.zero_()
            grad_query, *targets = _split(_projected_heads(grad_maps, num_heads), stride, strip)
            # The kernel adds to rows of adjacent columns.
            target = grad_query if stride == 1 else torch.zeros(query.shape, dtype=dtype)
            of_slope, of_factor = native_backend.local_attention_backward_add_(
                target,
                *targets,
                _heads(scaled[strip.images, :, rows], num_heads),
                *parts,
                slopes,
                scale.item() if one_scale else 1.0,
                lse_rows,
                *attention,
            )
            if target is not grad_query:
                grad_query += target
            grad_slopes += of_slope
            if one_scale:
                grad_scale += of_factor
        if any(of_projection):
            done = slice(strip.first, strip.done)
            product_dtype = _product_dtype(x.dtype)
            _add_projection_gradients(
                grad_maps[:, :, : strip.done - strip.first].to(product_dtype),
                x[strip.images, :, done].to(product_dtype),
                weight.to(product_dtype),
                of_projection,
                grad_x[strip.images, :, done],
                grad_weight,
                grad_bias,
            )
        if of_scale and not one_scale:
            # Rare (a deployed layer that is trained on): take the attention's result once more.
            result = torch.zeros_like(grad[strip.images, :, rows])
            ones = torch.ones_like(scale).view(num_heads, -1)
            native_backend.local_attention_add_(
                _heads(result, num_heads), torch.empty_like(lse_rows), *parts, slopes, ones,
                *attention,
            )  # fmt: skip
            grad_scale += (result * grad[strip.images, :, rows]).sum((0, 2, 3))
    if of_scale:
        of_value_bias = grad.sum((0, 2, 3)) * value_bias
        grad_scale += of_value_bias.sum() if one_scale else of_value_bias
    return [
        gradient.to(tensor.dtype)
        for gradient, tensor, need in zip([grad_x, *sums], inputs, needed, strict=True)
        if need
    ]


def _add_projection_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needed: Sequence[bool],
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Gradients of the projection by that of its result (B, 3 C, h, W); to sums they are added."""
    of_x, of_weight, of_bias = needed
    merged = _merged(x)
    targets = [operand(matrix) for matrix in _matrices(grad, merged)]
    for source, target in zip(_matrices(x, merged), targets, strict=True):
        if of_weight:
            grad_weight += product(target, source.T).view(weight.shape)
        if of_bias:
            grad_bias += target.sum(1, dtype=grad_bias.dtype)
    if of_x:
        back = weight.flatten(1).T
        if merged:
            (target,) = targets
            grad_x.copy_(product(back, target).view(-1, *x.movedim(1, 0).shape[1:]).movedim(0, 1))
        else:
            for image, target in zip(grad_x, targets, strict=True):
                product(back, target, image.flatten(1))


@_backward.register_fake
def _(grad, lse, x, weight, bias, slopes, kernel, scale, *geometry_and_needed):
    inputs, needed = (x, weight, bias, slopes, kernel, scale), geometry_and_needed[-1]
    return [t.new_empty(t.shape) for t, need in zip(inputs, needed, strict=True) if need]


def _setup_context(ctx, inputs, output):
    x, weight, bias, slopes, kernel, _, scale, *geometry = inputs
    ctx.save_for_backward(output[1], x, weight, bias, slopes, kernel, scale)
    ctx.geometry = geometry


def _autograd_backward(ctx, grad, grad_lse):
    needed = list(ctx.needs_input_grad[:7])
    of_kernel_bias = needed.pop(5)
    gradients = [None] * 6
    if any(needed):
        gradients = spread(_backward(grad, *ctx.saved_tensors, *ctx.geometry, needed), needed)
    grad_bias = grad.sum((0, 2, 3)) if of_kernel_bias else None
    return *gradients[:5], grad_bias, gradients[5], None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_order('acmix_mm::fused_acmix_backward', 'fused_acmix', 'native')


def _native(*args) -> Tensor:
    return _forward(*args)[0]


def _triton_refuses(x: Tensor, weight: Tensor, bias, slopes: Tensor, *args) -> str | None:
    return triton_backend.refuses(x, head_dim=slopes.size(0))


OPERATORS['fused_acmix'] = {
    'torch': Implementation(_by_parts),
    'native': Implementation(_native, native_backend.refuses),
    'triton': Implementation(_triton, _triton_refuses),
}
