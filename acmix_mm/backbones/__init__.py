"""Registered backbones, one family a file."""

from .acmix_pvt import ACmixPyramidVisionTransformer
from .acmix_resnet import ACmixResNet
from .acmix_swin import ACmixSwinTransformer
from .dwnet import DWNet
from .san import SAN, ACmixSAN
from .x_volution_resnet import XVolutionResNet

__all__ = [
    'SAN',
    'ACmixPyramidVisionTransformer',
    'ACmixResNet',
    'ACmixSAN',
    'ACmixSwinTransformer',
    'DWNet',
    'XVolutionResNet',
]
