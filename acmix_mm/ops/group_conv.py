"""Grouped convolution of few channels a group, the convolution path of the mixed operators."""

import torch.nn.functional as F
from torch import Tensor

from ._dispatch import OPERATORS, Implementation, autocast_tensors, dispatch
from .backends import native_backend


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
        stride (int): Default: 1.
        dilation (int): Default: 1.
        bias (Tensor | None): Shape (C,). Default: None.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' has a kernel of
            its own here, made for few channels a group, all others take ``F.conv2d``.

    Returns:
        Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)); under autocast, of its dtype.

    Raises:
        RuntimeError: If shapes or dtypes do not fit together.
    """
    inputs, weight, bias = autocast_tensors(maps.flatten(1, 2), weight, bias)
    return dispatch('group_conv', backend, inputs, weight, bias, stride, dilation, maps.size(1))


def conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> Tensor:
    """PyTorch's convolution, padded to keep the size at stride 1."""
    padding = weight.size(-1) // 2 * dilation
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


OPERATORS['group_conv'] = {
    'torch': Implementation(conv2d),
    'native': Implementation(native_backend.group_conv, native_backend.refuses),
}
