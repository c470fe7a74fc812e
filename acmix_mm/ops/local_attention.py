"""Public front of neighbourhood attention: argument checks and dispatch to a backend."""

import math

import torch
from torch import Tensor

from .backends import native_backend, torch_backend, triton_backend
from .checks import check_positive

_BACKENDS = {'torch': torch_backend.local_attention}
if native_backend.AVAILABLE:
    _BACKENDS['native'] = native_backend.local_attention
if triton_backend.AVAILABLE:
    _BACKENDS['triton'] = triton_backend.local_attention


def available_backends() -> tuple[str, ...]:
    """Names that :func:`local_attention` takes as ``backend`` on this installation.

    'torch' is plain PyTorch, for every device; 'native' is compiled C++, for the CPU; 'triton' is
    for GPUs, in float32 and half precision with a head dimension of at most 128. (With
    ``TRITON_INTERPRET=1`` 'triton' is there without a GPU, interpreted: for tests.)
    """
    return tuple(_BACKENDS)


def check_backend(backend: str | None) -> None:
    """Raise ``ValueError`` unless ``backend`` is None or an available backend's name."""
    if backend is not None and backend not in _BACKENDS:
        raise ValueError(f'backend must be None or one of {available_backends()}, got {backend!r}')


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

    Args:
        query (Tensor): Shape (B, N, d, ceil(H / stride), ceil(W / stride)): batch, heads, head
            dimension, height, width. Floating point.
        key (Tensor): Shape (B, N, d, H, W), dtype and device of ``query``; H, W >= 1.
        value (Tensor): As ``key``.
        kernel_size (int): Side k of the neighbourhood in keys, odd. Default: 7.
        stride (int): Keys between the neighbourhoods of adjacent queries. Default: 1.
        dilation (int): Distance between the keys of a neighbourhood. Default: 1.
        scale (float | None): Factor on the logits. Default: None, for ``d ** -0.5``.
        backend (str | None): One of :func:`available_backends`. The choice changes results by
            rounding only. Default: None, for 'triton' on a GPU and 'native' on the CPU, where
            available and able to take the tensors, and 'torch' elsewhere.

    Returns:
        Tensor: Shape and dtype of ``query``; under autocast, of the autocast dtype (inputs are
        cast as :func:`torch.nn.functional.scaled_dot_product_attention` casts them). Logits and
        softmax of half-precision inputs are computed in float32.

    Raises:
        TypeError: If query, key or value is not a floating-point tensor.
        ValueError: If shapes, dtypes or devices do not fit together or are not for ``backend``, or
            another argument is not as described; the message names it.
    """
    check_positive('kernel_size', kernel_size, odd=True)
    check_positive('stride', stride)
    check_positive('dilation', dilation)
    check_backend(backend)
    _check_tensors(query, key, value, stride)
    if scale is None:
        scale = query.size(2) ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f'scale must be a finite number or None, got {scale!r}')

    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            'query, key and value must have one dtype, got '
            f'{query.dtype}, {key.dtype}, {value.dtype}'
        )
    if backend is None:
        backend = _choose_backend(query)
    elif backend == 'native' and device_type != 'cpu':
        raise ValueError(f"backend 'native' needs tensors on the CPU, got {query.device}")
    elif backend == 'triton' and not triton_backend.supports(query):
        raise ValueError(
            f"backend 'triton' needs {triton_backend.REQUIREMENT}, got {query.dtype}, head "
            f'dimension {query.size(2)}, {query.device}'
        )
    function = _BACKENDS[backend]
    return function(query, key, value, kernel_size, stride, dilation, float(scale))


def _choose_backend(query: Tensor) -> str:
    # Interpreted, 'triton' takes the CPU's tensors too, but only on request.
    if query.device.type == 'cuda' and triton_backend.supports(query):
        return 'triton'
    if query.device.type == 'cpu' and native_backend.AVAILABLE:
        return 'native'
    return 'torch'


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, stride: int) -> None:
    for name, tensor in (('query', query), ('key', key), ('value', value)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f'{name} must be a floating-point tensor, got {got}')
        if tensor.dim() != 5:
            raise ValueError(
                f'{name} must have 5 dimensions (B, N, d, H, W), got shape {tuple(tensor.shape)}'
            )
    if min(key.shape[1:]) < 1:
        raise ValueError(f'key must have N, d, H, W >= 1, got shape {tuple(key.shape)}')
    if value.shape != key.shape:
        raise ValueError(
            f'value must have the shape of key, {tuple(key.shape)}, got {tuple(value.shape)}'
        )
    height, width = key.shape[-2:]
    expected = (*key.shape[:3], -(-height // stride), -(-width // stride))
    if tuple(query.shape) != expected:
        raise ValueError(
            f'query must have shape {expected} for key of shape {tuple(key.shape)} and stride '
            f'{stride}, got {tuple(query.shape)}'
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            'query, key and value must be on one device, got '
            f'{query.device}, {key.device}, {value.device}'
        )
