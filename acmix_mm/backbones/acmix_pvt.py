"""PVT-ACmix: mmdet's Pyramid Vision Transformer with mixed operators."""

import math

import torch.nn.functional as F
from mmdet.models.backbones.pvt import PVTEncoderLayer, PyramidVisionTransformer
from torch import Tensor

from ..layers import SpatialReductionACmix
from .mixed_transformer import MixedTransformer


class ACmixPyramidVisionTransformer(MixedTransformer, PyramidVisionTransformer):
    """PVT-ACmix ("On the Integration of Self-Attention and Convolution", CVPR 2022).

    Each spatial-reduction attention is mixed with a convolution path on query, key and value of the
    full map; that is our reading, see :class:`~acmix_mm.layers.SpatialReductionACmix`. Parameters
    have the names of mmdet's PyramidVisionTransformer, so its checkpoints and PVT's own load as
    they are. With rate1 = 1 and rate2 = 0 the outputs are that network's.

    Args:
        *args: Of mmdet's PyramidVisionTransformer.
        mix (str): How the paths are combined, see :class:`~acmix_mm.layers.MixedOperator`.
            Default: 'learned'.
        shift (str): How the convolution path shifts maps, see
            :class:`~acmix_mm.layers.MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): Kernels for the outputs of a head position, see the same; None
            is one each where they are learned. Default: None.
        conv_kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`. Default: None.
        warm_start (bool): Start as the plain network whose checkpoint ``init_cfg`` names, see
            :meth:`init_weights`; for ``mix='learned'``. Default: False.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves, for checkpoints of that
            form. Default: False.
        **kwargs: Of mmdet's PyramidVisionTransformer, with its defaults, which are those of PVT-S;
            PVT-T has ``num_layers=[2, 2, 2, 2]``.

    Inputs are images (B, in_channels, H, W) with H, W >= 1; images with a side below 32 pixels, too
    small for the plain network, are padded to 32 with zeros at the right and at the bottom. Outputs
    are a list of maps, one for each of ``out_indices``, with 64, 128, 320 and 512 channels at
    strides 4, 8, 16 and 32 (by default), sizes rounded down.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        *args,
        mix: str = 'learned',
        shift: str = 'learned',
        kernel_groups: int | None = None,
        conv_kernel_size: int = 3,
        backend: str | None = None,
        warm_start: bool = False,
        deploy: bool = False,
        **kwargs,
    ):
        super().__init__(
            *args,
            mix=mix,
            shift=shift,
            kernel_groups=kernel_groups,
            conv_kernel_size=conv_kernel_size,
            backend=backend,
            warm_start=warm_start,
            deploy=deploy,
            **kwargs,
        )

    def insert_operators(self, acmix: dict) -> None:
        for module in self.modules():
            if isinstance(module, PVTEncoderLayer):
                module.attn = SpatialReductionACmix(module.attn, **acmix)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of the stages in ``out_indices``."""
        # The side for which every reduction has a map of at least its ratio.
        least = max(
            math.prod(self.strides[: i + 1]) * ratio for i, ratio in enumerate(self.sr_ratios)
        )
        height, width = x.shape[-2:]
        if min(height, width) < least:
            x = F.pad(x, (0, max(0, least - width), 0, max(0, least - height)))
        return super().forward(x)
