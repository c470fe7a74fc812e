"""Both stages of ACmix as one operator of the native backend.

What the operators one by one cannot have: neither ``key - position`` nor the attention's result
exist as maps of their own, the gradients of both paths meet in one map without concatenations, and
training saves the input instead of query, key and value, which are projected anew in the backward
pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import native_backend
from .selection import autocast_tensors


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
) -> Tensor:
    """``scale * attention + convolution`` of ACmix (CVPR 2022, section 4); CPU, native backend.

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
        attn_kernel_size (int): Default: 7.
        stride (int): Default: 1.
        dilation (int): Default: 1.

    Returns:
        Tensor: Shape (B, N * d, ceil(H / stride), ceil(W / stride)).

    Raises:
        RuntimeError: If a shape or dtype is not as described.
    """
    x, weight, bias, kernel, kernel_bias = autocast_tensors(x, weight, bias, kernel, kernel_bias)
    geometry = (num_heads, attn_kernel_size, stride, dilation)
    return _forward(x, weight, bias, slopes, kernel, kernel_bias, scale, *geometry)[0]


def _project(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    return F.conv2d(x, weight, bias).unflatten(1, (-1, 3, num_heads))


def _split(maps: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, d, 3, N, H, W) -> query, key and value (B, N, d, H, W), query subsampled."""
    query, key, value = maps.permute(2, 0, 3, 1, 4, 5)
    return query[..., ::stride, ::stride], key, value


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
    maps = _project(x, weight, bias, num_heads)
    out = native_backend.group_conv(
        maps.flatten(1, 3), kernel, kernel_bias, stride, dilation, maps.size(1)
    )
    target = _heads(out, num_heads)
    lse = native_backend.local_attention_add_(
        target,
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
    size = [(n + stride - 1) // stride for n in x.shape[-2:]]
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    maps = _project(x, weight, bias, num_heads)
    head_dim = maps.size(1)
    grad_maps, grad_kernel = native_backend.group_conv_backward(
        grad, maps.flatten(1, 3), kernel, stride, dilation, head_dim
    )
    grad_maps = grad_maps.view(maps.shape)
    query, key, value = _split(maps, stride)
    targets = _split(grad_maps, stride)
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    # The kernel adds to rows of adjacent columns, and sums keys and values in sum_dtype.
    direct = (stride == 1, x.dtype == sum_dtype, x.dtype == sum_dtype)
    dtypes = (x.dtype, sum_dtype, sum_dtype)
    sums = [
        t if d else torch.zeros(t.shape, dtype=dtype)
        for t, d, dtype in zip(targets, direct, dtypes, strict=True)
    ]
    one_scale = scale.numel() == 1
    grad_attention = grad if one_scale else grad * scale.to(grad.dtype).view(-1, 1, 1)
    grad_slopes, grad_scale = native_backend.local_attention_backward_add_(
        *sums,
        _heads(grad_attention, num_heads),
        query,
        key,
        value,
        slopes,
        scale.item() if one_scale else 1.0,
        lse,
        attn_kernel_size,
        stride,
        dilation,
        head_dim**-0.5,
    )
    for target, total, d in zip(targets, sums, direct, strict=True):
        if not d:
            target.add_(total)
    if not one_scale:
        # Rare (a deployed layer that is trained on): take the attention's result once more.
        attention = torch.zeros_like(grad)
        ones = torch.ones_like(scale).view(num_heads, -1)
        native_backend.local_attention_add_(
            _heads(attention, num_heads), query, key, value, slopes, ones,
            attn_kernel_size, stride, dilation, head_dim**-0.5,
        )  # fmt: skip
        grad_scale = (attention * grad).sum((0, 2, 3), dtype=sum_dtype)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_maps.flatten(1, 3), x, weight, [weight.size(0)], [1, 1], [0, 0], [1, 1], False,
        [0, 0], 1, [True, True, True],
    )  # fmt: skip
    grad_slopes, grad_scale = grad_slopes.to(slopes.dtype), grad_scale.to(scale.dtype)
    return grad_x, grad_weight, grad_bias, grad_slopes, grad_kernel, grad_scale


@_backward.register_fake
def _(grad, lse, x, weight, bias, slopes, kernel, scale, *geometry):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias, slopes, kernel, scale))


def _setup_context(ctx, inputs, output):
    x, weight, bias, slopes, kernel, kernel_bias, scale, *geometry = inputs
    ctx.save_for_backward(output[1], x, weight, bias, slopes, kernel, scale)
    ctx.with_bias = kernel_bias is not None
    ctx.geometry = geometry


def _autograd_backward(ctx, grad, grad_lse):
    gradients = _backward(grad, *ctx.saved_tensors, *ctx.geometry)
    grad_bias = grad.sum((0, 2, 3)) if ctx.with_bias else None
    return *gradients[:5], grad_bias, gradients[5], None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
