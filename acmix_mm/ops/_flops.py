"""What the operators cost, told to PyTorch's counter of FLOPs (:mod:`torch.utils.flop_counter`).

There is a formula for each operator, so that ``FlopCounterMode`` counts a layer alike whichever
backend works, but that Triton projects anew for each path of ACmix. As in PyTorch's own formulas, a
multiplication with its addition is two FLOPs, and products, convolutions and weighted sums are
counted: softmax, norms, position encodings and what a backend computes only to mask it are not.
Backward passes are counted with what they compute anew, for the gradients that are needed.

A formula takes what it needs of an operator's arguments, by their names in its schema, and ``out``,
the result; tensors are shapes. ``needed`` tells which gradients are, in the order of the tensors
they belong to; where an operator does not have it, all are.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

Shape = Sequence[int]


def _local_attention(query: Shape, kernel_size: int, **_) -> int:
    """``4 k^2 B N d Hq Wq``: queries times k^2 keys each, weights times as many values."""
    return 4 * kernel_size**2 * prod(query)


def _local_attention_backward(
    query: Shape, kernel_size: int, needed: Sequence[bool] = (True,) * 3, **_
) -> int:
    """``10 k^2 B N d Hq Wq``, five products, as in PyTorch's formula for attention.

    They are the logits anew, the gradient of the weights (for query and key only), and those of
    query, key and value.
    """
    query_needed, key_needed, value_needed = needed
    products = 1 + (query_needed or key_needed) + query_needed + key_needed + value_needed
    return 2 * products * kernel_size**2 * prod(query)


def _local_attention_triton_backward(
    query: Shape, kernel_size: int, needed: Sequence[bool] = (True,) * 5, **_
) -> int:
    """The gradient of slopes is summed up from that of key, and that of the factor from outputs."""
    query_needed, key_needed, value_needed, slopes_needed, _ = needed
    needed = (query_needed, key_needed or slopes_needed, value_needed)
    return _local_attention_backward(query, kernel_size, needed) if any(needed) else 0


def _group_conv(weight: Shape, out: Shape, **_) -> int:
    """``2 B C Hq Wq M k^2`` for a weight (C, M, k, k), whatever the number of groups."""
    return 2 * prod(out) * prod(weight[1:])


def _group_conv_rows(output: Shape, weight: Shape, **_) -> int:
    """Of the rows of the output that are computed."""
    return _group_conv(weight, output)


def _group_conv_grad_input_rows(
    grad_input: Shape, grad: Shape, weight: Shape, height: int, **_
) -> int:
    """As much as the forward pass, by the share of the input's rows."""
    return _group_conv(weight, grad) * grad_input[2] // height


def _group_conv_grad_input(grad: Shape, weight: Shape, **_) -> int:
    """As much as the forward pass."""
    return _group_conv(weight, grad)


def _group_conv_grad_weight(grad: Shape, out: Shape, **_) -> int:
    """As much as the forward pass; the result has the weight's shape."""
    return _group_conv(out, grad)


def _fused_acmix(
    x: Shape, weight: Shape, kernel: Shape, attn_kernel_size: int, out: tuple[Shape, Shape], **_
) -> int:
    """``6 B C Cin H W`` for the projections, and attention and convolution as above."""
    result = out[0]
    return (
        _projection(x, weight)
        + _local_attention(result, attn_kernel_size)
        + _group_conv(kernel, result)
    )


def _fused_acmix_backward(
    grad: Shape,
    x: Shape,
    weight: Shape,
    kernel: Shape,
    scale: Shape,
    attn_kernel_size: int,
    needed: Sequence[bool] = (True,) * 6,
    **_,
) -> int:
    """The projections anew and their two gradients, and the backward passes of both paths.

    The gradient of one scale a channel takes attention anew, once more.
    """
    x_needed, weight_needed, bias_needed, slopes_needed, kernel_needed, scale_needed = needed
    maps_needed = x_needed or weight_needed or bias_needed
    flops = (1 + x_needed + weight_needed) * _projection(x, weight)
    flops += (maps_needed + kernel_needed) * _group_conv(kernel, grad)
    one_scale = prod(scale) == 1
    if maps_needed or slopes_needed or (scale_needed and one_scale):
        flops += _local_attention_backward(grad, attn_kernel_size)
    if scale_needed and not one_scale:
        flops += _local_attention(grad, attn_kernel_size)
    return flops


def _projection(x: Shape, weight: Shape) -> int:
    return _group_conv(weight, (x[0], weight[0], *x[2:]))


def _local_aggregation(kernel_size: int, out: Shape, **_) -> int:
    """``2 k^2 B C Hq Wq``: results are sums of k^2 products."""
    return 2 * kernel_size**2 * prod(out)


def _local_aggregation_backward(
    grad: Shape, kernel_size: int, needed: Sequence[bool] = (True,) * 2, **_
) -> int:
    """As much as the forward pass, for each of values and weights."""
    return sum(needed) * _local_aggregation(kernel_size, grad)


def _local_aggregation_gradient(grad: Shape, kernel_size: int, **_) -> int:
    """As much as the forward pass."""
    return _local_aggregation(kernel_size, grad)


def _patch_weights(weight: Shape, out: Shape, **_) -> int:
    """``2 B O Hq Wq R (1 + k^2)`` for a weight (R (1 + k^2), O)."""
    return 2 * prod(out) * weight[0]


def _patch_weights_backward(grad: Shape, weight: Shape, **_) -> int:
    """The gradients of maps and weight, as much as the forward pass each."""
    return 2 * _patch_weights(weight, grad)


def _linear(W: Shape, out: Shape, **_) -> int:
    """``2 M N K`` for rows of K numbers and a weight (N, K)."""
    return 2 * prod(out) * W[-1]


FORMULAS = {
    'fused_acmix': _fused_acmix,
    'fused_acmix_backward': _fused_acmix_backward,
    'group_conv_native': _group_conv,
    'group_conv_native_grad_input': _group_conv_grad_input,
    'group_conv_native_grad_input_rows_': _group_conv_grad_input_rows,
    'group_conv_native_grad_weight': _group_conv_grad_weight,
    'group_conv_native_grad_weight_rows': _group_conv_grad_weight,
    'group_conv_native_rows_': _group_conv_rows,
    'group_conv_triton': _group_conv,
    'group_conv_triton_grad_input': _group_conv_grad_input,
    'group_conv_triton_grad_weight': _group_conv_grad_weight,
    'local_aggregation': _local_aggregation,
    'local_aggregation_backward': _local_aggregation_backward,
    'local_aggregation_native': _local_aggregation,
    'local_aggregation_native_grad_value': _local_aggregation_gradient,
    'local_aggregation_native_grad_weight': _local_aggregation_gradient,
    'local_aggregation_triton': _local_aggregation,
    'local_aggregation_triton_grad_value': _local_aggregation_gradient,
    'local_aggregation_triton_grad_weight': _local_aggregation_gradient,
    'local_attention_native_backward': _local_attention_backward,
    'local_attention_native_backward_add_': _local_attention_backward,
    'local_attention_native_forward': _local_attention,
    'local_attention_native_forward_add_': _local_attention,
    'local_attention_torch': _local_attention,
    'local_attention_torch_backward': _local_attention_backward,
    'local_attention_triton_backward': _local_attention_triton_backward,
    'local_attention_triton_forward': _local_attention,
    'patch_weights_native': _patch_weights,
    'patch_weights_native_backward': _patch_weights_backward,
    'patch_weights_triton': _patch_weights,
    'patch_weights_triton_backward': _patch_weights_backward,
}

# PyTorch's attention kernel for the CPU, which its counter leaves out, and kernels that have the
# same arguments and a formula.
ALIKE = {
    '_scaled_dot_product_flash_attention_for_cpu': '_scaled_dot_product_flash_attention',
    '_scaled_dot_product_flash_attention_for_cpu_backward': (
        '_scaled_dot_product_flash_attention_backward'
    ),
}


def register_flop_formulas() -> None:
    """Tell PyTorch's counter; to be called once, when all operators are there."""
    operators = [(getattr(torch.ops.acmix_mm, n, None), f) for n, f in FORMULAS.items()]
    # oneDNN's product, see :mod:`._products`.
    operators.append((getattr(torch.ops.mkldnn, '_linear_pointwise', None), _linear))
    for operator, formula in operators:
        if operator is not None and operator not in flop_registry:  # its backend may be absent
            register_flop_formula(operator)(_by_name(operator, formula))
    for name, other in ALIKE.items():
        operator, other = (getattr(torch.ops.aten, n, None) for n in (name, other))
        if operator is not None and operator not in flop_registry and other in flop_registry:
            flop_registry[operator] = flop_registry[other]


def _by_name(operator: torch._ops.OpOverloadPacket, formula: Callable[..., int]) -> Callable:
    names = [argument.name for argument in operator.default._schema.arguments]

    def flops(*arguments, out_shape, **named) -> int:
        return formula(**dict(zip(names, arguments, strict=False)), **named, out=out_shape)

    return flops
