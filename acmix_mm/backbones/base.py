"""What all backbones that inherit from mmdet's share."""

from torch import nn


class TrainReturnsModule:
    """Before mmdet's class: ``train()`` and ``eval()`` return the module, as PyTorch has it."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        return self
