"""Mixed operators as modules; :class:`ACmix` and :class:`XVolution` are layer types."""

from .acmix import ACmix
from .mixed_operator import MixedOperator, ProjectedMixedOperator
from .patch_attention import PatchACmix, PatchAttention
from .spatial_reduction_acmix import SpatialReductionACmix
from .window_acmix import WindowACmix
from .x_volution import XVolution

__all__ = [
    'ACmix',
    'MixedOperator',
    'PatchACmix',
    'PatchAttention',
    'ProjectedMixedOperator',
    'SpatialReductionACmix',
    'WindowACmix',
    'XVolution',
]
