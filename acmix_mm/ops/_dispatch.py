"""Which backend an operator takes, and in which dtype it works."""

import functools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._autograd import transformed
from .backends import native_backend, triton_backend

BACKENDS = ('torch', 'native', 'triton')
BACKEND_VARIABLE = 'ACMIX_MM_BACKEND'


class Implementation(NamedTuple):
    """A backend's function for an operator.

    ``refuses`` takes the function's arguments and tells what they would have to be, for a message
    after "needs"; None where the function takes them. Of 'torch', the function is differentiable in
    every way, forward mode and transforms of torch.func included.
    """

    function: Callable
    refuses: Callable[..., str | None] = lambda *args: None


# {operator: {backend: implementation}}; each operator's file enters its own line. Every operator
# has 'torch', which takes everything.
OPERATORS: dict[str, dict[str, Implementation]] = {}


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this installation and machine have.

    'torch' is plain PyTorch, for every device; 'native' is compiled C++, for the CPU; 'triton' is
    for GPUs, in float32 and half precision with a head dimension of at most 128. (With
    ``TRITON_INTERPRET=1`` 'triton' is there without a GPU, interpreted: for tests.)
    """
    return tuple(name for name in BACKENDS if why_missing(name) is None)


def check_backend(backend: str | None, name: str = 'backend') -> None:
    """Raise ``ValueError`` unless ``backend`` is None or a backend's name, here or elsewhere."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f'{name} must be None or one of {BACKENDS}, got {backend!r}')


def why_missing(backend: str) -> str | None:
    """Why a backend is not there, None if it is."""
    modules = {'native': native_backend, 'triton': triton_backend}
    return modules[backend].MISSING if backend in modules else None


def select(operator: str, backend: str | None, *args) -> str:
    """The backend that computes an operator of these arguments, the first of which is a tensor.

    Args:
        operator (str): Of :data:`OPERATORS`.
        backend (str | None): A demand: that backend computes it, or the call fails; an operator
            without a kernel of that name is computed by 'torch'. None leaves the choice to the
            environment variable ``ACMIX_MM_BACKEND``, which is a preference, for all operators
            and arguments that its backend takes; then to the device: 'triton' on a GPU, 'native'
            on the CPU, and 'torch' for what they do not take, such as forward-mode derivatives.
        *args: Of the implementations.

    Raises:
        ValueError: If the backend demanded is not there or does not take the arguments, or a name
            is none of a backend.
    """
    implementations = OPERATORS[operator]
    device = args[0].device
    demanded = backend is not None
    asked = backend if demanded else os.environ.get(BACKEND_VARIABLE) or None
    check_backend(asked, 'backend' if demanded else BACKEND_VARIABLE)
    if device.type == 'meta':  # nothing is computed
        return 'torch'
    if demanded:
        missing = why_missing(backend)
        if missing is not None:
            raise ValueError(f'backend {backend!r} is not available: {missing}')
        if backend not in implementations:
            return 'torch'
        needs = implementations[backend].refuses(*args)
        if needs is None and backend != 'torch' and transformed():
            needs = (
                'no forward-mode differentiation or transform of torch.func, for which there is '
                "'torch' or None"
            )
        if needs is not None:
            raise ValueError(f'backend {backend!r} of {operator} needs {needs}')
        return backend
    if transformed():
        return 'torch'
    # Interpreted, 'triton' takes the CPU's tensors too, but only on request.
    automatic = {'cpu': 'native', 'cuda': 'triton'}.get(device.type)
    for name in (asked, automatic):
        if name not in implementations:
            continue
        missing = why_missing(name)
        if missing is None and implementations[name].refuses(*args) is None:
            return name
        if missing is not None and name == 'native' and not torch.compiler.is_compiling():
            _tell_missing(missing)
    return 'torch'


def dispatch(operator: str, backend: str | None, *args):
    """Result of an operator by the backend that :func:`select` names."""
    return OPERATORS[operator][select(operator, backend, *args)].function(*args)


@functools.cache
def _tell_missing(reason: str) -> None:
    """Say once that CPUs could be faster."""
    logging.getLogger('acmix_mm').warning(
        'The native CPU kernels are not there, operators on the CPU run in PyTorch, slower: %s',
        reason,
    )


def autocasts(tensor: Tensor) -> bool:
    """Is autocast on for the device of ``tensor``?"""
    # The meta device has no autocast, and refuses the question.
    return tensor.device.type != 'meta' and torch.is_autocast_enabled(tensor.device.type)


def autocast_tensors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype of autocast where it is on, as PyTorch casts those of a convolution.

    None and float64 stay as they are.
    """
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
