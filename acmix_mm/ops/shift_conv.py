"""The convolution path of ACmix: a 1x1 convolution ``fc`` and a grouped convolution, folded."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import native_backend
from .selection import autocast_tensors, select_backend


def shift_kernel(out_channels: int, groups: int, kernel_size: int) -> Tensor:
    """Kernel with which the grouped convolution sums ``kernel_size ** 2`` shifted maps.

    Input channel i of every group carries the map for kernel position i; it has a 1 there and 0
    elsewhere (ACmix, section 4.2: shift and aggregation as a convolution).

    Args:
        out_channels (int): Output channels, a multiple of ``groups``.
        groups (int): Groups of the convolution.
        kernel_size (int): Side k of the kernel, odd.

    Returns:
        Tensor: float32, shape (out_channels, k * k, k, k).
    """
    positions = kernel_size**2
    kernel = torch.eye(positions).view(positions, kernel_size, kernel_size)
    return kernel.repeat(out_channels, 1, 1, 1)


def folding_pays(
    num_maps: int, out_channels: int, groups: int, kernel_size: int, stride: int = 1
) -> bool:
    """Does the folded convolution have no more multiplications than ``fc`` and its convolution?

    Folded, an output pixel takes ``k^2 M`` of them a channel. In two steps, ``fc`` takes ``k^2 M``
    for each input pixel and head position, then the convolution ``k^4`` an output channel.
    """
    positions = kernel_size**2
    folded = positions * num_maps * out_channels
    two_steps = positions * num_maps * groups * stride**2 + positions**2 * out_channels
    return folded <= two_steps


def fold_shift_conv(fc_weight: Tensor, dep_weight: Tensor, groups: int) -> Tensor:
    r"""Kernel of the one convolution that equals ``fc`` and the grouped convolution after it.

    Both are linear: ``W[g, o, i] = sum_m dep[g, o, m] fc[m, i]``.

    Args:
        fc_weight (Tensor): Shape (k * k, M).
        dep_weight (Tensor): Shape (C, k * k, k, k).
        groups (int): Groups of the convolution, a divisor of C.

    Returns:
        Tensor: Shape (C, M, k, k).
    """
    dep_weight = dep_weight.unflatten(0, (groups, -1))
    return torch.einsum('gompq,mi->goipq', dep_weight, fc_weight).flatten(0, 1).contiguous()


def group_conv(
    maps: Tensor,
    weight: Tensor,
    stride: int = 1,
    dilation: int = 1,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution with one group a head position, zero padded to keep the size at stride 1.

    Args:
        maps (Tensor): Shape (B, d, M, H, W).
        weight (Tensor): Shape (C, M, k, k), C a multiple of d, k odd.
        stride (int): Default: 1.
        dilation (int): Default: 1.
        bias (Tensor | None): Shape (C,). Default: None.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' has a kernel of
            its own here, made for few channels a group, all others take ``F.conv2d``.

    Returns:
        Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)).
    """
    groups = maps.size(1)
    inputs = maps.flatten(1, 2)
    if select_backend(backend, inputs) == 'native':
        inputs, weight, bias = autocast_tensors(inputs, weight, bias)
        return native_backend.group_conv(inputs, weight, bias, stride, dilation, groups)
    padding = weight.size(-1) // 2 * dilation
    return F.conv2d(inputs, weight, bias, stride, padding, dilation, groups)


def bias_map(kernel: Tensor, size: tuple[int, int], stride: int = 1, dilation: int = 1) -> Tensor:
    """What a bias of ``fc`` adds to the result: constant but near the border, where zeros count.

    Args:
        kernel (Tensor): Shape (C, 1, k, k): the bias, (k * k, 1), folded by
            :func:`fold_shift_conv`.
        size (tuple[int, int]): Height and width of the maps.
        stride (int): Default: 1.
        dilation (int): Default: 1.

    Returns:
        Tensor: Shape (1, C, ceil(H / stride), ceil(W / stride)).
    """
    taps = torch.arange(kernel.size(-1), device=kernel.device) - kernel.size(-1) // 2
    rows, cols = (  # (outputs, k): is there a pixel under the tap?
        ((positions >= 0) & (positions < length)).to(kernel.dtype)
        for length in size
        for positions in [
            torch.arange(0, length, stride, device=kernel.device)[:, None] + taps * dilation
        ]
    )
    return (rows @ kernel[:, 0] @ cols.T)[None]


def shift_conv(
    maps: Tensor,
    fc_weight: Tensor,
    dep_weight: Tensor,
    stride: int = 1,
    dilation: int = 1,
    bias: Tensor | None = None,
    backend: str | None = None,
    fc_bias: Tensor | None = None,
) -> Tensor:
    r"""Stage II, convolution path, of ACmix (CVPR 2022, section 4.2).

    ``fc`` mixes the M maps of every head position, then a grouped convolution with one group a
    head position shifts and sums. Folded into one convolution where that pays, see
    :func:`folding_pays`; it then also saves the intermediate map.

    Args:
        maps (Tensor): Shape (B, d, M, H, W): batch, head positions, maps (query, key and value of
            all heads: M = 3 N), height, width.
        fc_weight (Tensor): Shape (k * k, M).
        dep_weight (Tensor): Shape (C, k * k, k, k), C a multiple of d, k odd: kernel of the
            grouped convolution with d groups and zero padding that keeps the size at stride 1.
        stride (int): Stride of the convolution. Default: 1.
        dilation (int): Dilation of the convolution. Default: 1.
        bias (Tensor | None): Shape (C,). Default: None.
        backend (str | None): Of :func:`group_conv`. Default: None.
        fc_bias (Tensor | None): Shape (k * k,), added to the maps that ``fc`` mixes, before zeros
            are padded. Default: None.

    Returns:
        Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)). Channel ``g * (C / d) + o`` is
        output o of head position g.
    """
    groups, num_maps = maps.shape[1:3]
    out_channels, _, _, kernel_size = dep_weight.shape
    if folding_pays(num_maps, out_channels, groups, kernel_size, stride):
        weight = fold_shift_conv(fc_weight, dep_weight, groups)
        out = group_conv(maps, weight, stride, dilation, bias, backend)
        if fc_bias is None:
            return out
        bias_kernel = fold_shift_conv(fc_bias[:, None], dep_weight, groups)
        return out + bias_map(bias_kernel, maps.shape[3:], stride, dilation)
    # Not matmul: in training it copies the maps, channels last, to make one product of all.
    pixels = maps.flatten(3).flatten(0, 1)
    weight = fc_weight.expand(pixels.size(0), -1, -1)
    if fc_bias is None:
        mixed = torch.bmm(weight, pixels)
    else:
        mixed = torch.baddbmm(fc_bias[:, None], weight, pixels)
    mixed = mixed.view(maps.size(0), groups, -1, *maps.shape[3:])
    return group_conv(mixed, dep_weight, stride, dilation, bias, backend)
