"""What operators cost, told to mmengine's counter, which get_flops.py of mmdet and mmseg calls."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def register_flop_formulas() -> None:
    """Give ``FlopAnalyzer`` and ``get_model_complexity_info`` PyTorch's formulas, halved.

    A multiplication with its addition is one FLOP there. Formulas are those of our operators, see
    :mod:`acmix_mm.ops`, and of products that mmengine leaves out; its own stay, of products and,
    what PyTorch does not count, of norms, pooling and interpolation.
    """
    from mmengine.analysis.complexity_analysis import _DEFAULT_SUPPORTED_FLOP_OPS as handles

    tensors = slice(3)  # the arguments that the formula takes
    attention = _handle(aten._scaled_dot_product_flash_attention, tensors)
    handles.setdefault('aten::scaled_dot_product_attention', attention)
    handles.setdefault('aten::baddbmm', _handle(aten.baddbmm, tensors))
    for operator in flop_registry:
        if str(operator).startswith('acmix_mm.'):
            handles.setdefault(operator._qualified_op_name, _handle(operator))


def _handle(
    operator: torch._ops.OpOverloadPacket, arguments: slice = slice(None)
) -> Callable[[list, list], int]:
    """The operator's formula for a node of a traced graph."""
    formula = flop_registry[operator]

    def flops(inputs: list, outputs: list) -> int:
        shapes = [_shape(value) for value in outputs]
        out = shapes[0] if len(shapes) == 1 else tuple(shapes)
        return formula(*map(_shape, inputs[arguments]), out_val=out) // 2

    return flops


def _shape(value: torch.Value):
    """The shape of a tensor, other constants as they are; None for what the graph computes."""
    return value.type().sizes() if value.isCompleteTensor() else value.toIValue()
