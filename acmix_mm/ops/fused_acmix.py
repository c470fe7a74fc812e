"""Both stages of ACmix as one operator.

The native backend has a kernel for it, with what the operators one by one cannot have: neither
``key - position`` nor the attention's result exist as maps of their own, the gradients of both
paths meet in one map without concatenations, and training saves the input instead of query, key and
value, which are projected anew in the backward pass.
"""

from collections.abc import Sequence

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
from .backends import native_backend, triton_backend
from .group_conv import group_conv
from .local_attention import local_attention


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
    return F.conv2d(x, weight, bias).unflatten(1, (-1, 3, num_heads))


def _split(maps: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, d, 3, N, H, W) -> query, key and value (B, N, d, H, W), query subsampled."""
    query, key, value = maps.permute(2, 0, 3, 1, 4, 5)
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
    times as much.
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
    attention = _attend(query, key, value, slopes, attn_kernel_size, stride, dilation, 'triton')
    return torch.addcmul(convolution, attention, scale.to(attention.dtype).view(-1, 1, 1))


def _heads(maps: Tensor, num_heads: int) -> Tensor:
    return maps.unflatten(1, (num_heads, -1))


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
    with torch.autocast('cpu', enabled=False):
        maps = _project(x, weight, bias, num_heads)
    out = native_backend.group_conv(
        maps.flatten(1, 3), kernel, kernel_bias, stride, dilation, maps.size(1)
    )
    lse = native_backend.local_attention_add_(
        _heads(out, num_heads),
        *_split(maps, stride),
        slopes,
        scale.expand(out.size(1)).view(num_heads, -1),
        attn_kernel_size,
        stride,
        dilation,
        maps.size(1) ** -0.5,
    )
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
    of_x, of_weight, of_bias, of_slopes, of_kernel, of_scale = needed
    of_maps = of_x or of_weight or of_bias
    one_scale = scale.numel() == 1
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    gradients: list[Tensor | None] = [None] * 6
    grad = grad.contiguous()
    with torch.autocast('cpu', enabled=False):
        maps = _project(x, weight, bias, num_heads)
    head_dim = maps.size(1)
    attention = (attn_kernel_size, stride, dilation, head_dim**-0.5)
    query, key, value = _split(maps, stride)
    if of_kernel:
        gradients[4] = torch.ops.acmix_mm.group_conv_native_grad_weight(
            grad, maps.flatten(1, 3), kernel.size(-1), stride, dilation, head_dim
        )
    if of_maps or of_slopes or (of_scale and one_scale):
        if of_maps:
            grad_maps = torch.ops.acmix_mm.group_conv_native_grad_input(
                grad, kernel, *x.shape[2:], stride, dilation, head_dim
            ).view(maps.shape)
        else:
            grad_maps = torch.zeros_like(maps, memory_format=torch.contiguous_format)
        targets = _split(grad_maps, stride)
        # The kernel adds to rows of adjacent columns, and sums keys and values in sum_dtype.
        direct = (stride == 1, x.dtype == sum_dtype, x.dtype == sum_dtype)
        dtypes = (x.dtype, sum_dtype, sum_dtype)
        sums = [
            t if d else torch.zeros(t.shape, dtype=dtype)
            for t, d, dtype in zip(targets, direct, dtypes, strict=True)
        ]
        scaled = grad if one_scale else grad * scale.to(grad.dtype).view(-1, 1, 1)
        gradients[3], gradients[5] = native_backend.local_attention_backward_add_(
            *sums,
            _heads(scaled, num_heads),
            query,
            key,
            value,
            slopes,
            scale.item() if one_scale else 1.0,
            lse,
            *attention,
        )
        for target, total, d in zip(targets, sums, direct, strict=True):
            if not d:
                target.add_(total)
    if of_maps:
        gradients[:3] = torch.ops.aten.convolution_backward(
            grad_maps.flatten(1, 3), x, weight, [weight.size(0)], [1, 1], [0, 0], [1, 1], False,
            [0, 0], 1, [of_x, of_weight, of_bias],
        )  # fmt: skip
    if of_scale and not one_scale:
        # Rare (a deployed layer that is trained on): take the attention's result once more.
        result = torch.zeros_like(grad)
        ones = torch.ones_like(scale).view(num_heads, -1)
        native_backend.local_attention_add_(
            _heads(result, num_heads), query, key, value, slopes, ones, *attention
        )
        gradients[5] = (result.to(sum_dtype) * grad.to(sum_dtype)).sum((0, 2, 3))
    inputs = (x, weight, bias, slopes, kernel, scale)
    # Contiguous, as the fake kernel says: of a channels-last x PyTorch's convolution gives
    # channels-last gradients.
    return [
        gradient.to(tensor.dtype).contiguous()
        for gradient, tensor, need in zip(gradients, inputs, needed, strict=True)
        if need
    ]


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
