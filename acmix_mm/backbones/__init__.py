"""Registered backbones, one family a file."""

from .acmix_resnet import ACmixResNet

__all__ = ['ACmixResNet']
