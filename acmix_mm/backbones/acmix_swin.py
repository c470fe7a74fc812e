"""Swin-ACmix: mmdet's Swin transformer with a mixed operator for every window attention."""

import math

import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinTransformer
from mmengine.model import BaseModule
from torch import Tensor

from ..layers import WindowACmix
from ..layers.window_acmix import moves
from .mixed_transformer import MixedTransformer


class ShiftWindowACmix(BaseModule):
    """Padding and cyclic shift around :class:`~acmix_mm.layers.WindowACmix`.

    As the release, and unlike mmdet's ShiftWindowMSA, it does not shift a map whose height or width
    is not larger than the window's.

    Args:
        attention (ShiftWindowMSA): mmdet's module, whose parts this one takes over.
        acmix (dict): Keyword arguments of ``WindowACmix``.
        conv_on_shifted (bool): Whether the convolution path sees the shifted map.
    """

    def __init__(self, attention: ShiftWindowMSA, acmix: dict, conv_on_shifted: bool):
        super().__init__()
        self.window_size = attention.window_size
        self.shift_size = attention.shift_size
        self.conv_on_shifted = conv_on_shifted
        self.w_msa = WindowACmix(attention.w_msa, **acmix)
        self.drop = attention.drop

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """(B, H * W, C) -> (B, H * W, C)."""
        height, width = hw_shape
        x = query.unflatten(1, hw_shape)
        missing = [self._whole_windows(size) - size for size in hw_shape]
        x = F.pad(x, (0, 0, 0, missing[1], 0, missing[0]))
        shift = self.shift_of(hw_shape)
        mask = None
        if moves(shift):
            x = x.roll((-shift, -shift), (1, 2))
            mask = shift_mask(*x.shape[1:3], self.window_size, shift, x)
        if self.conv_on_shifted:
            x = self.w_msa(x, mask)
            x = x.roll((shift, shift), (1, 2)) if moves(shift) else x
        else:
            x = self.w_msa(x, mask, unshift=shift)
        return self.drop(x[:, :height, :width].flatten(1, 2))

    def _whole_windows(self, size: int) -> int:
        """The size with padding, in a form of which torch.export sees that windows divide it."""
        return (size + self.window_size - 1) // self.window_size * self.window_size

    def shift_of(self, hw_shape: tuple[int, int]) -> int:
        """By how many pixels a map of that size is rolled to the left and upwards."""
        if not self.shift_size:
            return 0
        if torch.compiler.is_exporting():  # sizes may be symbols, and this holds for all of them
            larger = torch.sym_min(torch.sym_min(*hw_shape) // (self.window_size + 1), 1)
            return self.shift_size * larger
        return self.shift_size if min(hw_shape) > self.window_size else 0


def shift_mask(height: int, width: int, window_size: int, shift: int, like: Tensor) -> Tensor:
    """Swin's mask for windows that a cyclic shift filled from opposite sides of the map.

    Swin's own has -100 in place of -inf. That is the same but for weights such as exp(-100), a
    subnormal number in float32, with which CPUs compute many times more slowly than with zeros.

    Returns:
        Tensor: Shape (windows, window_size ** 2, window_size ** 2), 0 for pixels that were
        neighbours before the shift, -inf for others, in dtype and on the device of ``like``.
    """
    rows, cols = (
        torch.arange(size, device=like.device) >= size - shift for size in (height, width)
    )
    region = (2 * rows[:, None] + cols).unflatten(1, (-1, window_size))
    region = region.unflatten(0, (-1, window_size)).transpose(1, 2).flatten(2).flatten(0, 1)
    apart = region[:, :, None] != region[:, None]
    return like.new_zeros(apart.shape).masked_fill(apart, -math.inf)


class ACmixSwinTransformer(MixedTransformer, SwinTransformer):
    """Swin-ACmix ("On the Integration of Self-Attention and Convolution", CVPR 2022).

    Query, key and value are projected once, on the padded and shifted map, and used by both paths.
    Parameters have the names of mmdet's SwinTransformer: its checkpoints load as they are, Swin's
    own and the authors' release with ``convert_weights=True``. Any input size is taken, also with
    weights of the release, which is tied to one.

    With rate1 = 1 and rate2 = 0 the outputs are those of mmdet's SwinTransformer where all maps are
    larger than the window. Where one is not, blocks do not shift it, as in Swin's own code and the
    release; mmdet's do.

    Args:
        *args: Of mmdet's SwinTransformer.
        mix (str): How the paths are combined, see :class:`~acmix_mm.layers.MixedOperator`.
            Default: 'learned'.
        shift (str): How the convolution path shifts maps, see
            :class:`~acmix_mm.layers.MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): Kernels for the outputs of a head position, see the same; None
            is one each where they are learned. Default: None.
        conv_kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        conv_on_shifted (bool): Whether the convolution path of shifted blocks sees the shifted map,
            where it passes over what the shift brought together, as in the release; else it sees
            the map as it was. Default: True.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`. Default: None.
        warm_start (bool): Start as the plain network whose checkpoint ``init_cfg`` names, see
            :meth:`init_weights`; for ``mix='learned'``. Default: False.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves, for checkpoints of that
            form. Default: False.
        **kwargs: Of mmdet's SwinTransformer, with its defaults, which are those of Swin-T.

    Inputs are images (B, in_channels, H, W) with H, W >= 1; outputs a list of maps, one for each
    of ``out_indices``, with ``embed_dims`` times 1, 2, 4 and 8 channels at strides 4, 8, 16, 32.

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
        conv_on_shifted: bool = True,
        backend: str | None = None,
        warm_start: bool = False,
        deploy: bool = False,
        **kwargs,
    ):
        self._conv_on_shifted = conv_on_shifted
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
        for stage in self.stages:
            for block in stage.blocks:
                block.attn = ShiftWindowACmix(block.attn, acmix, self._conv_on_shifted)
