"""Products of matrices on CPUs, by the faster of the two libraries that PyTorch has for them.

MKL, which torch.mm takes, has half of an AVX-512 processor's speed where it is not Intel's, and
oneDNN, which convolutions take, has all of it (docs/benchmarks.md). What oneDNN computes here has
no formula for gradients: it is for backward passes and for what autograd does not see.

:func:`product` is for the inside of operators for CPUs. The others have the names of PyTorch's
functions, which they are wherever oneDNN is not faster or has to keep out: on other devices and in
other dtypes, where gradients are recorded, under autocast, while graphs are made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import transformed
from .backends import native_backend

PLAIN = (Tensor, torch.nn.Parameter)  # and not what stands for a tensor while graphs are made


def _onednn_pays(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies matrices of ``dtype`` faster than torch.mm."""
    return dtype == torch.float32 and torch.ops.acmix_mm.native_onednn_products_pay()


def _takes_onednn(*tensors: Tensor) -> bool:
    """The same of any tensors, anywhere."""
    if native_backend.MISSING is not None or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled('cpu') or transformed():
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    plain = all(type(t) in PLAIN and t.device.type == 'cpu' and t.numel() for t in tensors)
    return plain and all(_onednn_pays(t.dtype) for t in tensors)


def operand(matrix: Tensor) -> Tensor:
    """As products take it: over gaps between rows, oneDNN would be a thousand times slower."""
    if not _onednn_pays(matrix.dtype) or matrix.is_contiguous() or matrix.T.is_contiguous():
        return matrix
    return matrix.contiguous()


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` on a CPU, without gradients; written to ``out`` where given, of any dtype."""
    if _onednn_pays(a.dtype):
        result = _by_onednn(a, b)
    elif out is None or out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    else:
        result = torch.mm(a, b)
    return result if out is None else out.copy_(result)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(operand(a), operand(b).T, bias, 'none', [], '')


def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear."""
    if not _takes_onednn(tokens, weight, *([] if bias is None else [bias])):
        return F.linear(tokens, weight, bias)
    out = _by_onednn(tokens.flatten(0, -2), weight.T, bias)
    return out.unflatten(0, tokens.shape[:-1])


def mm(a: Tensor, b: Tensor) -> Tensor:
    """As torch.mm."""
    return _by_onednn(a, b) if _takes_onednn(a, b) else torch.mm(a, b)


def addmm_(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As ``out.addmm_(a, b)``."""
    return out.add_(_by_onednn(a, b)) if _takes_onednn(out, a, b) else out.addmm_(a, b)


def bmm(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """As torch.bmm, or as torch.baddbmm to ``added``."""
    if not _takes_onednn(a, b, *([] if added is None else [added])):
        return torch.bmm(a, b) if added is None else torch.baddbmm(added, a, b)
    out = a.new_empty(a.size(0), a.size(1), b.size(2))
    for left, right, target in zip(a, b, out, strict=True):
        result = _by_onednn(left, right)
        if added is None:
            target.copy_(result)
        else:
            torch.add(result, added, out=target)
    return out
