"""Where the tests run a backend, and which of them Triton's interpreter makes slow."""

from collections.abc import Iterable

import pytest

from acmix_mm.ops import available_backends
from acmix_mm.ops.backends import triton_backend

needs_native = pytest.mark.skipif(
    'native' not in available_backends(),
    reason='the native kernels are not built: this installation has no C++ compiler',
)
needs_triton = pytest.mark.skipif(
    'triton' not in available_backends(), reason='Triton is not installed, which is for Linux'
)


def device_of(backend: str) -> str:
    """'cuda' for a backend of GPUs, unless it is interpreted."""
    return 'cuda' if backend == 'triton' and not triton_backend.INTERPRETED else 'cpu'


def slow_if_interpreted(backends: Iterable[str]) -> list:
    """Backends as parameters of a test that takes 'triton' ten seconds and more, interpreted."""
    slow = triton_backend.INTERPRETED
    return [
        pytest.param(name, marks=[pytest.mark.slow] if slow and name == 'triton' else [])
        for name in backends
    ]
