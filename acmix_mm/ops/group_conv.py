"""Grouped convolution of few channels a group, the convolution path of the mixed operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_dtypes, check_positive, check_shape, check_tensors
from ._dispatch import OPERATORS, Implementation, autocast_tensors, dispatch
from .backends import native_backend, triton_backend


def group_conv(
    maps: Tensor,
    weight: Tensor,
    stride: int = 1,
    dilation: int = 1,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolution with one group a head position, zero padded to keep the size at stride 1.

    It may be differentiated any number of times.

    Args:
        maps (Tensor): Shape (B, d, M, H, W).
        weight (Tensor): Shape (C, M, k, k), C a multiple of d, k odd.
        stride (int): Stride of the convolution. Default: 1.
        dilation (int): Dilation of the convolution. Default: 1.
        bias (Tensor | None): Shape (C,). Default: None.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' and
            'triton' have kernels of their own here, made for few channels a group; 'triton' takes
            ``F.conv2d`` where a group has 1 or more than 64, in or out, as 'torch' does always.

    Returns:
        Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)); under autocast, of its dtype.

    Raises:
        TypeError: If maps, weight or bias is not a floating-point tensor.
        ValueError: If shapes, dtypes or devices do not fit together, or another argument is not as
            described; the message names it.
    """
    check_positive('stride', stride)
    check_positive('dilation', dilation)
    check_tensors(maps=maps, weight=weight)
    if maps.dim() != 5 or min(maps.shape[1:]) < 1:
        raise ValueError(
            f'maps must have shape (B, d, M, H, W), got {tuple(maps.shape)}; d, M, H, W >= 1'
        )
    groups, num_maps = maps.shape[1:3]
    square = weight.dim() == 4 and weight.size(2) == weight.size(3) and weight.size(3) % 2 == 1
    fits = square and weight.size(1) == num_maps
    if not fits or weight.size(0) < 1 or weight.size(0) % groups:
        raise ValueError(
            f'weight must have shape (C, {num_maps}, k, k), C a multiple of {groups}, k odd, for '
            f'maps of shape {tuple(maps.shape)}, got {tuple(weight.shape)}'
        )
    if bias is not None:
        check_tensors(maps=maps, bias=bias)
        check_shape('bias', bias, (weight.size(0),), f'weight of shape {tuple(weight.shape)}')
    inputs, weight, bias = autocast_tensors(maps.flatten(1, 2), weight, bias)
    check_dtypes(maps=inputs, weight=weight, bias=bias)
    return dispatch('group_conv', backend, inputs, weight, bias, stride, dilation, groups)


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> Tensor:
    """PyTorch's convolution, padded to keep the size at stride 1."""
    padding = weight.size(-1) // 2 * dilation
    # In float64 on a CPU, PyTorch 2.13 gives a wrong gradient of channels-last weights in groups.
    weight = weight.contiguous()
    if input.device.type == 'cpu' and input.dtype == torch.bfloat16 and input.size(-1) <= stride:
        # One column, of a stride with which there are two: on CPUs with AMX, PyTorch 2.13 gives
        # wrong maps of more than four such rows, and leaves parts of a weight's gradient unwritten
        # where the stride is larger than the width.
        strides = (stride, (input.size(-1) + 1) // 2)
        return F.conv2d(input, weight, bias, strides, padding, dilation, groups)[..., :1]
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


OPERATORS['group_conv'] = {
    'torch': Implementation(conv2d),
    'native': Implementation(native_backend.group_conv, native_backend.refuses),
}
if triton_backend.MISSING is None:
    from .backends import triton_group_conv

    # Channels of a group, in and out, for which the kernels are made: beyond, matrix instructions
    # have enough to do in any convolution; below, it is depth-wise.
    FEW = range(2, 65)

    def _in_triton(
        input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
    ) -> Tensor:
        few = weight.size(1) in FEW and weight.size(0) // groups in FEW
        function = triton_group_conv.group_conv if few else conv2d
        return function(input, weight, bias, stride, dilation, groups)

    OPERATORS['group_conv']['triton'] = Implementation(_in_triton, triton_backend.refuses_tensor)
