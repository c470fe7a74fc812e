"""Where the tests run a backend."""

from acmix_mm.ops.backends import triton_backend


def device_of(backend: str) -> str:
    """'cuda' for a backend of GPUs, unless it is interpreted."""
    return 'cuda' if backend == 'triton' and not triton_backend.INTERPRETED else 'cpu'
