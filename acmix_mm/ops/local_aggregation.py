"""Sum of a neighbourhood's values by given weights, which groups of channels share (SAN)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import refuse_second_order, spread, transformed
from ._checks import check_dtypes, check_geometry, check_tensors, strided_size
from ._dispatch import OPERATORS, Implementation, dispatch
from ._reflection import reflect_pad
from .backends import native_backend, triton_backend
from .export import unrolled_local_aggregation


def local_aggregation(
    value: Tensor,
    weight: Tensor,
    kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
    padding_mode: str = 'reflect',
    backend: str | None = None,
) -> Tensor:
    """``out[c, i] = sum_j weight[c mod G, j, i] value[c, i + j]`` over a k x k neighbourhood.

    The aggregation of "Exploring Self-attention for Image Recognition" (CVPR 2020, section 3) and
    of inhomogeneous dynamic depth-wise convolution. Neither forward nor backward pass holds
    anything of the size of unfolded values.

    Args:
        value (Tensor): Shape (B, C, H, W), H, W >= 1.
        weight (Tensor): Shape (B, G, k * k, ceil(H / stride), ceil(W / stride)), dtype and device
            of ``value``, C a multiple of G.
        kernel_size (int): Side k of the neighbourhood, odd. Default: 7.
        stride (int): Values between adjacent results. Default: 1.
        dilation (int): Distance between the values of a neighbourhood. Default: 1.
        padding_mode (str): What is beyond the border: 'reflect' (the map reflected, as often as
            needed) or 'zeros'. Default: 'reflect'.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' and
            'triton' have kernels of their own here. Default: None.

    Returns:
        Tensor: Shape (B, C, ceil(H / stride), ceil(W / stride)).

    Raises:
        TypeError: If value or weight is not a floating-point tensor.
        ValueError: If an argument is not as described; the message names it.
    """
    check_geometry(kernel_size, stride, dilation)
    check_tensors(value=value, weight=weight)
    if padding_mode not in ('reflect', 'zeros'):
        raise ValueError(f"padding_mode must be 'reflect' or 'zeros', got {padding_mode!r}")
    if value.dim() != 4 or min(value.shape[1:]) < 1:
        raise ValueError(
            f'value must have shape (B, C, H, W) with C, H, W >= 1, got {tuple(value.shape)}'
        )
    batch, channels = value.shape[:2]
    size = strided_size(value, stride)
    if weight.dim() != 5 or (weight.size(0), *weight.shape[2:]) != (batch, kernel_size**2, *size):
        raise ValueError(
            f'weight must have shape ({batch}, G, {kernel_size**2}, {size[0]}, {size[1]}) for '
            f'value of shape {tuple(value.shape)}, kernel_size {kernel_size} and stride {stride}, '
            f'got {tuple(weight.shape)}'
        )
    if weight.size(1) < 1 or channels % weight.size(1):
        raise ValueError(
            f'weight must have a number of groups that divides {channels}, got {weight.size(1)}'
        )
    check_dtypes(value=value, weight=weight)
    geometry = (kernel_size, stride, dilation, padding_mode)
    return dispatch('local_aggregation', backend, value, weight, *geometry)


def _in_torch(
    value: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int, padding_mode: str
) -> Tensor:
    pixels = kernel_size // 2 * dilation
    padded = reflect_pad(value, pixels) if padding_mode == 'reflect' else F.pad(value, [pixels] * 4)
    function = unrolled_local_aggregation if transformed() else _forward
    return function(padded, weight, kernel_size, stride, dilation)


OPERATORS['local_aggregation'] = {
    'torch': Implementation(_in_torch),
    'native': Implementation(native_backend.local_aggregation, native_backend.refuses),
}
if triton_backend.MISSING is None:
    from .backends.triton_local_aggregation import local_aggregation as _in_triton

    OPERATORS['local_aggregation']['triton'] = Implementation(
        _in_triton, triton_backend.refuses_tensor
    )


def _windows(
    padded: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> list[Tensor]:
    """What each position of the neighbourhood sees: views (B, C / G, G, Hq, Wq)."""
    if weight.size(2) != kernel_size**2:  # of a call without the checks in front
        raise ValueError(
            f'weight must have kernel_size ** 2 = {kernel_size**2} positions, got {weight.size(2)}'
        )
    padded = padded.unflatten(1, (-1, weight.size(1)))
    height, width = weight.shape[-2:]
    return [
        padded[
            ...,
            top : top + (height - 1) * stride + 1 : stride,
            left : left + (width - 1) * stride + 1 : stride,
        ]
        for top in range(0, kernel_size * dilation, dilation)
        for left in range(0, kernel_size * dilation, dilation)
    ]


@torch.library.custom_op('acmix_mm::local_aggregation', mutates_args=())
def _forward(
    padded: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    shape = (padded.size(0), padded.size(1) // weight.size(1), weight.size(1), *weight.shape[-2:])
    # Half precision is for storage; sums are kept in float32.
    out = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    for j, window in enumerate(_windows(padded, weight, kernel_size, stride, dilation)):
        out.addcmul_(window, weight[:, None, :, j])
    return out.flatten(1, 2).to(weight.dtype)


@_forward.register_fake
def _(padded, weight, kernel_size, stride, dilation):
    return weight.new_empty(padded.size(0), padded.size(1), *weight.shape[-2:])


@torch.library.custom_op('acmix_mm::local_aggregation_backward', mutates_args=())
def _backward(
    grad: Tensor,
    padded: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of padded and weight that are ``needed``."""
    of_padded, of_weight = needed
    geometry = (kernel_size, stride, dilation)
    sum_dtype = torch.promote_types(weight.dtype, torch.float32)
    grad = grad.unflatten(1, (-1, weight.size(1))).to(sum_dtype)
    gradients = []
    if of_padded:
        sums = torch.zeros(padded.shape, dtype=sum_dtype, device=padded.device)
        for j, target in enumerate(_windows(sums, weight, *geometry)):
            target.addcmul_(grad, weight[:, None, :, j])
        gradients.append(sums.to(padded.dtype))
    if of_weight:
        grad_weight = weight.new_empty(weight.shape)
        for j, window in enumerate(_windows(padded, weight, *geometry)):
            grad_weight[:, :, j] = (grad * window).sum(1)
        gradients.append(grad_weight)
    return gradients


@_backward.register_fake
def _(grad, padded, weight, kernel_size, stride, dilation, needed):
    tensors = zip((padded, weight), needed, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, need in tensors if need]


def _setup_context(ctx, inputs, output):
    padded, weight, *ctx.geometry = inputs
    ctx.save_for_backward(padded, weight)


def _autograd_backward(ctx, grad):
    needed = ctx.needs_input_grad[:2]
    gradients = _backward(grad, *ctx.saved_tensors, *ctx.geometry, needed)
    return *spread(gradients, needed), None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_order('acmix_mm::local_aggregation_backward', 'local_aggregation', 'torch')
