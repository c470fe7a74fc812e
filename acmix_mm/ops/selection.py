"""Which backend an operator takes, and in which dtype it works."""

import os

import torch
from torch import Tensor

from .backends import native_backend, triton_backend

BACKEND_VARIABLE = 'ACMIX_MM_BACKEND'


def available_backends() -> tuple[str, ...]:
    """Names that operators and layers take as ``backend`` on this installation.

    'torch' is plain PyTorch, for every device; 'native' is compiled C++, for the CPU; 'triton' is
    for GPUs, in float32 and half precision with a head dimension of at most 128. (With
    ``TRITON_INTERPRET=1`` 'triton' is there without a GPU, interpreted: for tests.)
    """
    available = {'native': native_backend.AVAILABLE, 'triton': triton_backend.AVAILABLE}
    return ('torch', *(name for name, present in available.items() if present))


def check_backend(backend: str | None, name: str = 'backend') -> None:
    """Raise ``ValueError`` unless ``backend`` is None or an available backend's name."""
    if backend is not None and backend not in available_backends():
        raise ValueError(f'{name} must be None or one of {available_backends()}, got {backend!r}')


def select_backend(backend: str | None, tensor: Tensor, triton: bool | None = None) -> str:
    """The backend that works on ``tensor``.

    Args:
        backend (str | None): What the caller asks for. None leaves it to the environment variable
            ``ACMIX_MM_BACKEND`` and, where that is not set or empty, to the device.
        tensor (Tensor): One of the operator's inputs.
        triton (bool | None): Whether 'triton' takes the tensor. None for operators without a
            Triton kernel, for which 'torch' serves in its place. Default: None.

    Raises:
        ValueError: If the backend asked for is not available or does not take the tensor.
    """
    name = 'backend'
    if backend is None:
        backend = os.environ.get(BACKEND_VARIABLE) or None
        name = BACKEND_VARIABLE
    check_backend(backend, name)
    device = tensor.device
    if backend is None:
        # Interpreted, 'triton' takes the CPU's tensors too, but only on request.
        if triton and device.type == 'cuda':
            return 'triton'
        return 'native' if device.type == 'cpu' and native_backend.AVAILABLE else 'torch'
    if backend == 'native' and device.type != 'cpu':
        raise ValueError(f"{name} 'native' needs tensors on the CPU, got {device}")
    if backend == 'triton' and triton is None:
        return 'torch'
    if backend == 'triton' and not triton:
        raise ValueError(
            f"{name} 'triton' needs {triton_backend.REQUIREMENT}, got shape "
            f'{tuple(tensor.shape)}, {tensor.dtype}, {device}'
        )
    return backend


def autocast_tensors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of autocast where it is on, as PyTorch casts those of a convolution.

    None and float64 stay as they are.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
