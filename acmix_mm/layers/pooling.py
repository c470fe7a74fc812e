"""Pooling between a backbone of any family and the linear head of an image classifier."""

from collections.abc import Sequence

from torch import Tensor, nn


class LastMapPooling(nn.Module):
    """Mean over the pixels of the last of a backbone's maps; a neck of mmpretrain's classifiers.

    Unlike mmpretrain's GlobalAveragePooling, it takes the lists that mmdet's transformers return,
    and can normalise first, for those that leave their final norm out, as mmdet's PVT.

    Args:
        norm_channels (int | None): Channels of the map, for a layer norm before the mean.
            Default: None, for no norm.
    """

    def __init__(self, norm_channels: int | None = None):
        super().__init__()
        self.norm = nn.Identity() if norm_channels is None else nn.LayerNorm(norm_channels, 1e-6)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor]:
        """Maps (B, C, H, W), of which the last counts -> one tensor (B, C)."""
        pixels = maps[-1].flatten(2).transpose(1, 2)
        return (self.norm(pixels).mean(1),)
