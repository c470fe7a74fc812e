"""Operators in plain PyTorch, for exporters and transforms that know none of the kernels."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._reflection import reflect


def unrolled_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int,
    dilation: int,
    scale: float,
) -> Tensor:
    """:func:`acmix_mm.ops.local_attention` of traceable operators, one step a row of the window.

    Height and width may be symbols of ``torch.export``. Needs the memory of ``3 * kernel_size``
    copies of key or value at a time.
    """
    dtype = query.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    query, key, value = (t.to(sum_dtype) for t in (query, key, value))
    offsets = (torch.arange(kernel_size, device=query.device) - kernel_size // 2) * dilation

    def positions(dim: int) -> Tensor:
        """(k, queries): where the neighbourhoods' keys lie along an axis."""
        centres = torch.arange(query.size(dim), device=query.device) * stride
        return reflect(centres + offsets[:, None], key.size(dim))

    rows, columns = positions(-2), positions(-1)

    def window_rows(maps: Tensor) -> Iterator[Tensor]:
        """(B, N, d, Hq, k, Wq) for each row of the window: what that of every query sees."""
        maps = _take_columns(maps, columns)
        return (maps.index_select(-3, row) for row in rows)

    logits = [(query[..., None, :] * row).sum(2) for row in window_rows(key)]
    weights = (torch.cat(logits, -2) * scale).softmax(-2).unsqueeze(2).chunk(kernel_size, -2)
    outputs = [(w * row).sum(-2) for w, row in zip(weights, window_rows(value), strict=True)]
    return torch.stack(outputs).sum(0).to(dtype)


def unrolled_local_aggregation(
    padded: Tensor, weight: Tensor, kernel_size: int, stride: int, dilation: int
) -> Tensor:
    """:func:`acmix_mm.ops.local_aggregation` of a padded map, one step a row of the window."""
    dtype = weight.dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    padded, weight = padded.to(sum_dtype), weight.to(sum_dtype)
    groups, height, width = weight.size(1), *weight.shape[-2:]
    offsets = torch.arange(kernel_size, device=weight.device)[:, None] * dilation
    rows = torch.arange(height, device=weight.device) * stride + offsets
    columns = torch.arange(width, device=weight.device) * stride + offsets
    padded = _take_columns(padded, columns)
    out = 0
    for i, row_weight in enumerate(weight.unflatten(2, (kernel_size, -1)).unbind(2)):
        row = padded.index_select(-3, rows[i]).unflatten(1, (-1, groups))
        out = out + (row * row_weight.transpose(2, 3).unsqueeze(1)).sum(-2)
    return out.flatten(1, 2).to(dtype)


def _take_columns(maps: Tensor, columns: Tensor) -> Tensor:
    """(..., H, W) and (k, Wq) -> (..., H, k, Wq).

    Transposed, and once for all rows of a window: along the last axis, ONNX Runtime moves numbers
    one by one.
    """
    return maps.mT.index_select(-2, columns.flatten()).mT.unflatten(-1, (len(columns), -1))


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """What ``ExportedProgram.run_decompositions`` needs beside PyTorch's own.

    For programs exported with ``backend='torch'``, in evaluation mode: the operators that other
    runtimes do not know become plain PyTorch. See ``tools/model_converters/export_onnx.py``.
    """
    return {
        torch.ops.acmix_mm.local_attention_torch.default: unrolled_local_attention,
        torch.ops.acmix_mm.local_aggregation.default: unrolled_local_aggregation,
    }
