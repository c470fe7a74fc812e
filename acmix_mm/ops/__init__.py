"""Functions on tensors; they need torch only.

The operators check their arguments and dispatch to backends, see :func:`available_backends`.
Everything else in this folder is internal.
"""

from ._dispatch import available_backends
from ._flops import register_flop_formulas
from .fused_acmix import fused_acmix
from .group_conv import group_conv
from .local_aggregation import local_aggregation
from .local_attention import local_attention
from .norm_relu_conv import norm_relu_conv
from .patch_weights import patch_weights

__all__ = [
    'available_backends',
    'fused_acmix',
    'group_conv',
    'local_aggregation',
    'local_attention',
    'norm_relu_conv',
    'patch_weights',
]

register_flop_formulas()
