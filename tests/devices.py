"""Where the tests run a backend, and which of them Triton's interpreter makes slow."""

from collections.abc import Iterable

import pytest

from acmix_mm.ops.backends import triton_backend


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
