"""Public front of neighbourhood attention: argument checks and dispatch to a backend."""

import math

from torch import Tensor

from ._checks import check_attention, check_dtypes
from ._dispatch import OPERATORS, Implementation, autocast_tensors, dispatch
from .backends import native_backend, torch_backend, triton_backend

OPERATORS['local_attention'] = {
    'torch': Implementation(torch_backend.local_attention),
    'native': Implementation(native_backend.local_attention, native_backend.refuses),
    'triton': Implementation(triton_backend.local_attention, triton_backend.refuses),
}


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Multi-head attention of every query pixel to the neighbourhood of its own position.

    With :math:`r = \lfloor k / 2 \rfloor`, query :math:`(y, x)` attends to the :math:`k \times k`
    keys at :math:`(s y + D i, s x + D j)`, :math:`-r \le i, j \le r`, for stride :math:`s` and
    dilation :math:`D`. Positions beyond the border are reflected back into the map, as often as
    needed; an axis of one pixel replicates. This is the attention path of ACmix ("On the
    Integration of Self-Attention and Convolution", CVPR 2022, section 4.1) without its position
    encoding, which can be folded into the keys (see :class:`acmix_mm.layers.ACmix`).

    A NaN or infinity reaches what is computed from the neighbourhoods that it lies in, and nothing
    else, in the gradients likewise. There are no second-order gradients.

    Args:
        query (Tensor): Shape (B, N, d, ceil(H / stride), ceil(W / stride)): batch, heads, head
            dimension, height, width. Floating point.
        key (Tensor): Shape (B, N, d, H, W), dtype and device of ``query``; H, W >= 1.
        value (Tensor): As ``key``.
        kernel_size (int): Side k of the neighbourhood in keys, odd. Default: 7.
        stride (int): Keys between the neighbourhoods of adjacent queries. Default: 1.
        dilation (int): Distance between the keys of a neighbourhood. Default: 1.
        scale (float | None): Factor on the logits. Default: None, for ``d ** -0.5``.
        backend (str | None): 'torch', 'native' or 'triton', see :func:`available_backends`. A
            demand: where that backend cannot compute the call, it fails. The choice changes
            results by rounding only. Default: None, for what the environment variable
            ``ACMIX_MM_BACKEND`` names, a preference, and then 'triton' on a GPU and 'native' on
            the CPU; 'torch' for what those do not take.

    Returns:
        Tensor: Shape and dtype of ``query``; under autocast, of the autocast dtype (inputs are
        cast as :func:`torch.nn.functional.scaled_dot_product_attention` casts them). Logits and
        softmax of half-precision inputs are computed in float32. On a GPU, 'triton' multiplies
        float32 as TF32 where :mod:`torch.backends.cudnn` allows it for convolutions, as is
        PyTorch's default, and its results have channels last in memory.

    Raises:
        TypeError: If query, key or value is not a floating-point tensor.
        ValueError: If shapes, dtypes or devices do not fit together or are not for ``backend``, or
            another argument is not as described; the message names it.
    """
    check_attention(query, key, value, kernel_size, stride, dilation)
    if scale is None:
        scale = query.size(2) ** -0.5
    elif not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f'scale must be a finite number or None, got {scale!r}')

    query, key, value = autocast_tensors(query, key, value)
    check_dtypes(query=query, key=key, value=value)
    geometry = (kernel_size, stride, dilation, float(scale))
    return dispatch('local_attention', backend, query, key, value, *geometry)
