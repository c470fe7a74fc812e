"""Operators in C++ for the CPU: float64, float32, bfloat16 and float16.

Neighbourhood attention, a grouped convolution for few channels a group, and, for inference, the
weights of patchwise attention.

The library is compiled from ``csrc`` when the package is installed; without a compiler it is absent
and the PyTorch backend serves. Kernels for AVX-512, AVX2 and baseline processors are chosen at run
time; ``ATEN_CPU_CAPABILITY`` limits the choice as it does for PyTorch's own.
"""

import importlib.util
import warnings

import torch
from torch import Tensor


def _load() -> bool:
    """Load the compiled library, which registers the operators; False where there is none."""
    spec = importlib.util.find_spec('acmix_mm.ops._native')
    if spec is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        warnings.warn(
            f'{spec.origin} does not load ({error}); install acmix_mm anew beside this torch to '
            'have the native backend',
            stacklevel=2,
        )
        return False
    return True


AVAILABLE = _load()

if AVAILABLE:
    _forward = torch.ops.acmix_mm.local_attention_native_forward
    _backward = torch.ops.acmix_mm.local_attention_native_backward

    @torch.library.register_fake('acmix_mm::local_attention_native_forward')
    def _(query, key, value, kernel_size, stride, dilation, scale):
        dtype = torch.promote_types(query.dtype, torch.float32)
        return (
            query.new_empty(query.shape),
            query.new_empty((*query.shape[:2], *query.shape[3:]), dtype=dtype),
        )

    @torch.library.register_fake('acmix_mm::local_attention_native_backward')
    def _(grad, query, key, value, lse, kernel_size, stride, dilation, scale):
        return tuple(t.new_empty(t.shape) for t in (query, key, value))

    def _setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], output[1])
        ctx.geometry = inputs[3:]

    def _autograd_backward(ctx, grad, grad_lse):
        return *_backward(grad, *ctx.saved_tensors, *ctx.geometry), None, None, None, None

    torch.library.register_autograd(
        'acmix_mm::local_attention_native_forward', _autograd_backward, setup_context=_setup_context
    )

    _group_conv = torch.ops.acmix_mm.group_conv_native
    _group_conv_backward = torch.ops.acmix_mm.group_conv_native_backward

    @torch.library.register_fake('acmix_mm::group_conv_native')
    def _(input, weight, bias, stride, dilation, groups):
        size = ((length - 1) // stride + 1 for length in input.shape[2:])
        return input.new_empty((input.size(0), weight.size(0), *size))

    @torch.library.register_fake('acmix_mm::group_conv_native_backward')
    def _(grad, input, weight, stride, dilation, groups):
        return input.new_empty(input.shape), weight.new_empty(weight.shape)

    def _setup_group_conv(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.geometry = inputs[3:]

    def _autograd_group_conv(ctx, grad):
        grad_input = grad_weight = grad_bias = None
        if any(ctx.needs_input_grad[:2]):
            grad_input, grad_weight = _group_conv_backward(grad, *ctx.saved_tensors, *ctx.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_input, grad_weight, grad_bias, None, None, None

    torch.library.register_autograd(
        'acmix_mm::group_conv_native', _autograd_group_conv, setup_context=_setup_group_conv
    )

    @torch.library.register_fake('acmix_mm::patch_weights_native')
    def _(padded, scale, shift, weight, kernel_size, stride, dilation):
        reach = (kernel_size - 1) * dilation
        size = ((length - reach - 1) // stride + 1 for length in padded.shape[2:])
        return padded.new_empty((padded.size(0), weight.size(1), *size))


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """Arguments, already checked, and result as in :func:`acmix_mm.ops.local_attention`.

    Training keeps inputs and one log-sum-exp a query and head. Memory beyond that: some
    packed rows a thread; for half precision, the backward pass also sums the gradients of key and
    value in float32.
    """
    return _forward(query, key, value, kernel_size, stride, dilation, scale)[0]


def local_attention_add_(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    factor: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """Add ``factor`` (N, d) times attention to ``output``; return a log-sum-exp a query and head.

    Keys are taken less ``slopes`` (d, 2) times their position (x, y), linspace(-1, 1) over width
    and height. Not differentiable by itself.
    """
    geometry = (kernel_size, stride, dilation, scale)
    return torch.ops.acmix_mm.local_attention_native_forward_add_(
        output, query, key, value, slopes, factor, *geometry
    )


def local_attention_backward_add_(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    factor: float,
    lse: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`local_attention_add_` with one factor for all channels.

    Adds to the first three, of which key's and value's are float32 for half precision, and returns
    the gradients of ``slopes`` (d, 2) and ``factor`` (1,) in float64.
    """
    geometry = (kernel_size, stride, dilation, scale)
    return torch.ops.acmix_mm.local_attention_native_backward_add_(
        grad_query, grad_key, grad_value, grad, query, key, value, slopes, factor, lse, *geometry
    )


def group_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, groups: int
) -> Tensor:
    """Grouped convolution with square odd kernels and zero padding that keeps the size at stride 1.

    As :func:`torch.nn.functional.conv2d` with ``padding = k // 2 * dilation``, for few channels a
    group, where that is slow. The input, (B, C, H, W), may have any strides; the sums of half
    precision are float32. Memory beyond inputs and results: some packed rows a thread, and for the
    gradient of the weight at most 64 partial sums.
    """
    return _group_conv(input, weight, bias, stride, dilation, groups)


def group_conv_backward(
    grad: Tensor, input: Tensor, weight: Tensor, stride: int, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`group_conv` with respect to input, contiguous, and weight."""
    return _group_conv_backward(grad, input, weight, stride, dilation, groups)


def patch_weights(
    padded: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """1x1 convolution of the ReLU of the scaled and shifted patch of a map; no gradients.

    Args:
        padded (Tensor): Map (B, R, H + 2 p, W + 2 p), p = dilation * (kernel_size // 2), float32 or
            float64.
        scale (Tensor): Shape (R * k * k,); input channels are ``channel * k * k + position``.
        shift (Tensor): Shape (R * k * k,).
        weight (Tensor): Shape (R * k * k, O).
        kernel_size (int): Side k of the patch.
        stride (int): Pixels between patches.
        dilation (int): Pixels between the positions of a patch.

    Returns:
        Tensor: Shape (B, O, ceil(H / stride), ceil(W / stride)).
    """
    return torch.ops.acmix_mm.patch_weights_native(
        padded, scale, shift, weight, kernel_size, stride, dilation
    )
