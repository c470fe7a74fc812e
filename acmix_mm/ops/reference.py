"""Every operator from its formula, in float64: what the backends are compared with.

Slow, differentiable, on the CPU, and with nothing of the backends: neighbourhoods are looked up by
index, convolutions are sums of taps. Arguments are those of the operators; batch norms are called
as they are, so they have to be in float64.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tolerance(dtype: torch.dtype, summands: int, size: float) -> float:
    """Largest error that rounding explains, of sums of products of numbers of about 1.

    Half precision is for storage, sums are float32's. Rounding errors of a sum are independent:
    they grow with the square root of the number of its summands.

    Args:
        dtype (torch.dtype): Of inputs and results.
        summands (int): Of a result.
        size (float): Largest absolute value of the results.
    """
    sum_dtype = torch.promote_types(dtype, torch.float32)
    of_sum = torch.finfo(sum_dtype).eps * math.sqrt(summands)
    return 8 * max(torch.finfo(dtype).eps, of_sum) * max(1.0, size)


def _in_float64(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def run(*args, **kwargs) -> Tensor:
        return function(*(a.double() if isinstance(a, Tensor) else a for a in args), **kwargs)

    return run


def mirror(position: int, size: int) -> int:
    """Walk a position back into [0, size), turning round at the border pixels."""
    if size == 1:
        return 0
    while not 0 <= position < size:
        position = -position if position < 0 else 2 * (size - 1) - position
    return position


def neighbours(height: int, width: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """(Hq, Wq, k * k) flat key indices of every query's neighbourhood."""
    steps = [dilation * i for i in range(-(kernel_size // 2), kernel_size // 2 + 1)]
    rows, columns = (
        torch.tensor([[mirror(p + s, size) for s in steps] for p in range(0, size, stride)])
        for size in (height, width)
    )
    return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2)


def reflected(maps: Tensor, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """(B, C, H, W) -> (B, C, k * k, Hq, Wq): what each tap sees of the map, reflected."""
    index = neighbours(*maps.shape[-2:], kernel_size, stride, dilation)
    return maps.flatten(2)[..., index].permute(0, 1, 4, 2, 3)


def zero_padded(maps: Tensor, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """The same, with zeros beyond the map."""
    reach = kernel_size // 2 * dilation
    height, width = maps.shape[-2:]
    padded = F.pad(maps, [reach] * 4)
    return torch.stack(
        [
            padded[..., top : top + height : stride, left : left + width : stride]
            for top in range(0, kernel_size * dilation, dilation)
            for left in range(0, kernel_size * dilation, dilation)
        ],
        2,
    )


@_in_float64
def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int = 1,
    dilation: int = 1,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q . k) v over neighbourhoods."""
    scale = 1 / math.sqrt(query.size(2)) if scale is None else scale
    index = neighbours(*key.shape[-2:], kernel_size, stride, dilation)
    keys, values = (maps.flatten(3)[..., index] for maps in (key, value))  # (B, N, d, Hq, Wq, k k)
    logits = scale * (query[..., None] * keys).sum(2)
    # Of a query with an infinite logit, no weight is a number.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return (weights[:, :, None] * values).sum(-1)


@_in_float64
def group_conv(
    maps: Tensor, weight: Tensor, stride: int, dilation: int, bias: Tensor | None
) -> Tensor:
    """Sum over the taps of a zero-padded convolution; d groups of maps (B, d, M, H, W)."""
    groups = maps.size(1)
    taps = zero_padded(maps.flatten(1, 2), weight.size(-1), stride, dilation)
    taps = taps.unflatten(1, (groups, -1))
    weight = weight.flatten(2).unflatten(0, (groups, -1))
    out = torch.einsum('bgmkyx,gomk->bgoyx', taps, weight).flatten(1, 2)
    return out if bias is None else out + bias.view(-1, 1, 1)


@_in_float64
def fused_acmix(
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
    """Projections, then the two paths and their sum."""
    maps = torch.einsum('bchw,oc->bohw', x, weight.flatten(1)) + bias.view(-1, 1, 1)
    maps = maps.unflatten(1, (-1, 3, num_heads))
    query, key, value = maps.permute(2, 0, 3, 1, 4, 5)
    y, x = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in x.shape[-2:])
    position = slopes[:, :1, None] * x + slopes[:, 1:, None] * y[:, None]
    geometry = (attn_kernel_size, stride, dilation)
    query = query[..., ::stride, ::stride]
    attention = local_attention(query, key - position, value, *geometry).flatten(1, 2)
    convolution = group_conv(maps.flatten(2, 3), kernel, stride, dilation, kernel_bias)
    return scale.view(-1, 1, 1) * attention + convolution


@_in_float64
def local_aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    padding_mode: str = 'reflect',
) -> Tensor:
    """Weighted sum over neighbourhoods; channel c has the weights of group c mod G."""
    windows = {'reflect': reflected, 'zeros': zero_padded}[padding_mode]
    weight = weight.repeat(1, value.size(1) // weight.size(1), 1, 1, 1)
    return (windows(value, kernel_size, stride, dilation) * weight).sum(2)


@_in_float64
def patch_weights(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    norm: nn.Module,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """Batch norm, ReLU and 1x1 convolution of the query beside the patch of keys."""
    patch = reflected(key, kernel_size, stride, dilation).flatten(1, 2)
    return F.conv2d(norm(torch.cat([query, patch], 1)).relu(), weight)


@_in_float64
def norm_relu_conv(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The three, one after another."""
    return F.conv2d(norm(x).relu(), weight, bias)
