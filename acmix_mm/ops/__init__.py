"""Functions on tensors; they need torch only."""

from .checks import check_positive
from .local_attention import available_backends, check_backend, local_attention
from .shift_conv import shift_conv, shift_kernel

__all__ = [
    'available_backends',
    'check_backend',
    'check_positive',
    'local_attention',
    'shift_conv',
    'shift_kernel',
]
