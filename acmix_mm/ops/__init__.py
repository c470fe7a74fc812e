"""Functions on tensors; they need torch only."""

from .batch_norm import batch_norm, is_batch_norm
from .checks import check_positive
from .fused_acmix import fused_acmix
from .local_aggregation import local_aggregation
from .local_attention import local_attention
from .norm_relu_conv import norm_relu_conv
from .patch_weights import patch_weights
from .selection import available_backends, check_backend, select_backend
from .shift_conv import (
    bias_map,
    fold_shift_conv,
    folding_pays,
    group_conv,
    shift_conv,
    shift_kernel,
)

__all__ = [
    'available_backends',
    'batch_norm',
    'bias_map',
    'check_backend',
    'check_positive',
    'fold_shift_conv',
    'folding_pays',
    'fused_acmix',
    'group_conv',
    'is_batch_norm',
    'local_aggregation',
    'local_attention',
    'norm_relu_conv',
    'patch_weights',
    'select_backend',
    'shift_conv',
    'shift_kernel',
]
