"""DWNet: Swin's pyramid with depth-wise convolution in place of window attention."""

from collections.abc import Sequence
from typing import ClassVar

from mmcv.cnn import build_norm_layer
from mmdet.models.backbones.swin import SwinBlock, SwinTransformer
from mmdet.models.layers import nchw_to_nlc, nlc_to_nchw
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..layers import DepthwiseBlock
from ..layers.checkpoint import checkpoint_module
from .base import Backbone


class DWNetBlock(BaseModule):
    """Residual block: depth-wise convolution, then BN and a two-layer perceptron.

    Args:
        block (SwinBlock): mmdet's block, whose perceptron and drop path this one takes over.
        operator (DepthwiseBlock): In place of norm and window attention.
        norm (nn.Module): Before the perceptron.
    """

    def __init__(self, block: SwinBlock, operator: DepthwiseBlock, norm: nn.Module):
        super().__init__()
        self.with_cp = block.with_cp
        self.attn2conv = operator
        self.drop_path = block.attn.drop
        self.bn = norm
        self.ffn = block.ffn

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        if self.with_cp and x.requires_grad:
            return checkpoint_module(self, self._forward, x, hw_shape)
        return self._forward(x, hw_shape)

    def _forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        maps = nlc_to_nchw(x, hw_shape)
        maps = maps + self.drop_path(self.attn2conv(maps))
        return self.ffn(nchw_to_nlc(self.bn(maps)), identity=nchw_to_nlc(maps))


class DWNet(Backbone, SwinTransformer):
    """Swin's pyramid with (dynamic) depth-wise convolution in place of window attention.

    "On the Connection between Local Attention and Dynamic Depth-wise Convolution", ICLR 2022,
    arXiv 2106.04263. A block is ``x + operator(x)``, then ``x + perceptron(BN(x))``, see
    :class:`~acmix_mm.layers.DepthwiseBlock` for the operator. As in the authors' release, batch
    norms replace the layer norms of blocks and outputs, while patch embedding and patch merging
    keep theirs. Its ImageNet weights load with ``convert_weights=True``. Unlike the release, maps
    are not padded to multiples of a window, which the convolution has no need of.

    Args:
        arch (str | dict): 'tiny' or 'base', or a dict of ``embed_dims`` (int, channels of the first
            stage; the others have 2, 4 and 8 times as many) and ``depths`` (four numbers of
            blocks). Default: 'tiny', 96 and (2, 2, 6, 2); 'base' is 128 and (2, 2, 18, 2).
        dynamic (str | None): None for static kernels, 'homogeneous' for kernels predicted from the
            whole image (in training with two images or more), or 'inhomogeneous' for kernels
            predicted at each position, 32 of them, each for as many adjacent channels
            (``embed_dims`` is a multiple of 32). Default: None.
        kernel_size (int): Side of the depth-wise kernels, odd. Default: 7.
        drop_path_rate (float | None): Stochastic depth of the last block, rising to it linearly
            from 0. Default: None, for the release's on ImageNet: 0.5 for 'base', 0.2 otherwise.
        norm_cfg (dict | None): Of blocks and outputs. Default: None, for dict(type='BN').
        in_channels (int): Of the image. Default: 3.
        out_indices (Sequence[int]): Which of the four stages to return. Default: (0, 1, 2, 3).
        frozen_stages (int): Without gradient, in evaluation mode: -1 nothing, 0 the patch
            embedding, 1 to 4 also as many stages. Default: -1.
        with_cp (bool): Compute blocks anew in the backward pass, to save memory. Default: False.
        backend (str | None): Of :func:`acmix_mm.ops.local_aggregation`, for 'inhomogeneous'.
            Default: None.
        convert_weights (bool): Whether ``init_cfg`` names a checkpoint of the release. Default:
            False.
        init_cfg (dict | None): ``dict(type='Pretrained', checkpoint=...)``. Default: None, for
            random weights: as in Swin, normal of 0.02 for linear layers, and PyTorch's for
            convolutions.

    Inputs are images (B, in_channels, H, W) with H, W >= 1; outputs a tuple of maps, one for each
    of ``out_indices``, with ``embed_dims`` times 1, 2, 4 and 8 channels at strides 4, 8, 16, 32.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    arch_settings: ClassVar = {
        'tiny': {'embed_dims': 96, 'depths': (2, 2, 6, 2)},
        'base': {'embed_dims': 128, 'depths': (2, 2, 18, 2)},
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        dynamic: str | None = None,
        *,
        kernel_size: int = 7,
        drop_path_rate: float | None = None,
        norm_cfg: dict | None = None,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        backend: str | None = None,
        convert_weights: bool = False,
        init_cfg: dict | None = None,
    ):
        settings = self.arch_settings.get(arch) if isinstance(arch, str) else arch
        if not isinstance(settings, dict) or set(settings) != {'embed_dims', 'depths'}:
            raise ValueError(
                f"arch must be 'tiny', 'base' or a dict of embed_dims and depths, got {arch!r}"
            )
        if not out_indices or not set(out_indices) <= set(range(4)):
            raise ValueError(f'out_indices must be of 0, 1, 2, 3, got {out_indices}')
        if drop_path_rate is None:
            drop_path_rate = 0.5 if arch == 'base' else 0.2
        super().__init__(
            **settings,
            num_heads=(1, 1, 1, 1),  # of the attention that is replaced below
            in_channels=in_channels,
            out_indices=tuple(out_indices),
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=with_cp,
            convert_weights=convert_weights,
            init_cfg=init_cfg,
        )
        norm_cfg = norm_cfg or {'type': 'BN'}

        def norm_layer(channels: int) -> nn.Module:
            return build_norm_layer(norm_cfg, channels)[1]

        for channels, stage in zip(self.num_features, self.stages, strict=True):
            for i, block in enumerate(stage.blocks):
                operator = DepthwiseBlock(channels, kernel_size, dynamic, norm_layer, backend)
                stage.blocks[i] = DWNetBlock(block, operator, norm_layer(channels))
        for i in self.out_indices:
            setattr(self, f'norm{i}', norm_layer(self.num_features[i]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages in ``out_indices``."""
        x, hw_shape = self.patch_embed(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x, hw_shape, out, out_shape = stage(x, hw_shape)
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(nlc_to_nchw(out, out_shape)))
        return tuple(outs)
