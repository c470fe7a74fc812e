"""Where the tests run a backend, and which of them Triton's interpreter makes slow."""

from collections.abc import Iterable

import pytest
import torch

from acmix_mm.ops import available_backends
from acmix_mm.ops.backends import triton_backend

needs_native = pytest.mark.skipif(
    'native' not in available_backends(),
    reason='the native kernels are not built: this installation has no C++ compiler',
)
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this PyTorch is built without oneDNN'
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


def operators_on_tensors() -> set[str]:
    """Qualified names of this package's custom operators, but for questions about the processor."""
    ours = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith('acmix_mm::')]
    return {s.name for s in ours if s.arguments}
