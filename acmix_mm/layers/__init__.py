"""Operators as modules; :class:`ACmix` and :class:`XVolution` are registered as layer types."""

from .acmix import ACmix
from .depthwise import DepthwiseBlock, HomogeneousDepthwiseConv, InhomogeneousDepthwiseConv
from .mixed_operator import MixedOperator, ProjectedMixedOperator
from .patch_attention import PatchACmix, PatchAttention
from .pooling import LastMapPooling
from .spatial_reduction_acmix import SpatialReductionACmix
from .window_acmix import WindowACmix
from .x_volution import XVolution

__all__ = [
    'ACmix',
    'DepthwiseBlock',
    'HomogeneousDepthwiseConv',
    'InhomogeneousDepthwiseConv',
    'LastMapPooling',
    'MixedOperator',
    'PatchACmix',
    'PatchAttention',
    'ProjectedMixedOperator',
    'SpatialReductionACmix',
    'WindowACmix',
    'XVolution',
]
