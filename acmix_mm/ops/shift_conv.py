"""The convolution path of ACmix: a 1x1 convolution ``fc`` and a grouped convolution, folded."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def shift_conv(
    maps: Tensor,
    fc_weight: Tensor,
    dep_weight: Tensor,
    stride: int = 1,
    dilation: int = 1,
) -> Tensor:
    r"""Stage II, convolution path, of ACmix (CVPR 2022, section 4.2).

    ``fc`` mixes the M maps of every head position, then a grouped convolution with one group a
    head position shifts and sums. Both are linear, so they are one grouped convolution with kernel
    ``W[g, o, i] = sum_m dep[g, o, m] fc[m, i]``. That form is taken where it has no more
    multiplications, and saves the intermediate map; with many heads the two steps have fewer.

    Args:
        maps (Tensor): Shape (B, d, M, H, W): batch, head positions, maps (query, key and value of
            all heads: M = 3 N), height, width.
        fc_weight (Tensor): Shape (k * k, M).
        dep_weight (Tensor): Shape (C, k * k, k, k), C a multiple of d, k odd: kernel of the
            grouped convolution with d groups and zero padding that keeps the size at stride 1.
        stride (int): Stride of the convolution. Default: 1.
        dilation (int): Dilation of the convolution. Default: 1.

    Returns:
        Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)). Channel ``g * (C / d) + o`` is
        output o of head position g.
    """
    groups, num_maps = maps.shape[1:3]
    out_channels, positions, kernel_size = dep_weight.shape[:3]
    padding = kernel_size // 2 * dilation
    pixels_in_a_pixel_out = stride**2
    folded = positions * num_maps * out_channels
    two_steps = (
        positions * num_maps * groups * pixels_in_a_pixel_out + positions * positions * out_channels
    )
    if folded <= two_steps:
        dep_weight = dep_weight.unflatten(0, (groups, -1))
        weight = torch.einsum('gompq,mi->goipq', dep_weight, fc_weight).flatten(0, 1)
        inputs = maps.flatten(1, 2)
    else:
        weight = dep_weight
        inputs = torch.matmul(fc_weight, maps.flatten(3)).unflatten(3, maps.shape[3:])
        inputs = inputs.flatten(1, 2)
    return F.conv2d(inputs, weight, None, stride, padding, dilation, groups)
