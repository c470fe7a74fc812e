"""Batch norms that operators take: PyTorch's, and what mmengine makes of one where it is there."""

import importlib.util

from torch import nn


def reverted(channels: int, **kwargs) -> nn.Module:
    """mmengine's, of nn.SyncBatchNorm: no nn.BatchNorm2d."""
    from mmengine.model import revert_sync_batchnorm

    return revert_sync_batchnorm(nn.SyncBatchNorm(channels, **kwargs))


class OtherForward(nn.BatchNorm2d):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


BATCH_NORMS = [nn.BatchNorm2d, nn.SyncBatchNorm]
if importlib.util.find_spec('mmengine') is not None:
    BATCH_NORMS.append(reverted)
