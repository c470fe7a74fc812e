"""Backbones, one family a file; mmengine's registry knows them by their names."""

from ..openmmlab import check_requirements, register

check_requirements()

from .acmix_pvt import ACmixPyramidVisionTransformer  # noqa: E402
from .acmix_resnet import ACmixResNet  # noqa: E402
from .acmix_swin import ACmixSwinTransformer  # noqa: E402
from .dwnet import DWNet  # noqa: E402
from .san import SAN, ACmixSAN  # noqa: E402
from .x_volution_resnet import XVolutionResNet  # noqa: E402

__all__ = [
    'SAN',
    'ACmixPyramidVisionTransformer',
    'ACmixResNet',
    'ACmixSAN',
    'ACmixSwinTransformer',
    'DWNet',
    'XVolutionResNet',
]

register()
