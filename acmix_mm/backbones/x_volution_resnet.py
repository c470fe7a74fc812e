"""ResNet with X-volution for the 3x3 convolutions of chosen stages."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from mmdet.models.backbones.resnet import Bottleneck, ResNet

from ..layers import XVolution
from ..layers.x_volution import NEIGHBOURS
from .operator_resnet import OperatorResNet


class XVolutionResNet(OperatorResNet):
    """ResNet with X-volution (arXiv 2106.02253, section 4) for 3x3 convolutions.

    In the chosen stages, :class:`~acmix_mm.layers.XVolution` takes the place of both convolutions
    of a basic block (18, 34) and of the 3x3 convolution of a bottleneck (26, 50, 101). By default
    that is the third stage, where it was best in the paper's experiments. Its batch norms are of
    the same ``norm_cfg`` as all others. The block's own norm stays after the sum of the operator's
    two branches, which the paper leaves open, so that blocks are mmdet's in all else;
    :meth:`switch_to_deploy` folds it, too. Depth 26, blocks (1, 2, 4, 1), is not the paper's but
    there for comparison with ResNet-ACmix 26.

    Args:
        depth (int): 18, 26, 34, 50 or 101.
        attention (str): 'pixel_shift' or 'local', see :class:`~acmix_mm.layers.XVolution`.
            Default: 'pixel_shift'.
        directions (Sequence[tuple[int, int]]): Of 'pixel_shift', see the same. Default: all eight
            neighbours.
        shift (int): Of 'pixel_shift': length of a step in pixels. Default: 1.
        num_steps (int): Of 'pixel_shift': steps in every direction. Default: 1.
        num_heads (int): Of 'local': attention heads. Default: 4.
        attn_kernel_size (int): Of 'local': side of the attention's neighbourhood, odd. Default: 7.
        conv_kernel_size (int): Side of the convolution branch's kernel, odd. Default: 3.
        backend (str | None): Of :func:`acmix_mm.ops.local_attention`. Default: None.
        stage_with_xvolution (Sequence[bool]): Which stages have it; the others keep their
            convolutions, so that all False is the plain ResNet of the same depth.
            Default: the third of four.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves, for checkpoints of that
            form. Default: False.
        **kwargs: All other arguments of mmdet's ResNet, with its defaults, but ``dcn`` and
            ``stage_with_dcn``.

    Inputs are images (B, in_channels, H, W) with H, W >= 1; outputs a tuple of maps, one for each
    of ``out_indices``, at strides 4, 8, 16 and 32, with 256, 512, 1024 and 2048 channels (at
    ``base_channels`` 64), a quarter of that with basic blocks.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    arch_settings: ClassVar = {
        **{depth: ResNet.arch_settings[depth] for depth in (18, 34, 50, 101)},
        26: (Bottleneck, (1, 2, 4, 1)),
    }
    stages_argument = 'stage_with_xvolution'

    def __init__(
        self,
        depth: int,
        *,
        attention: str = 'pixel_shift',
        directions: Sequence[tuple[int, int]] = NEIGHBOURS,
        shift: int = 1,
        num_steps: int = 1,
        num_heads: int = 4,
        attn_kernel_size: int = 7,
        conv_kernel_size: int = 3,
        backend: str | None = None,
        stage_with_xvolution: Sequence[bool] = (False, False, True, False),
        deploy: bool = False,
        **kwargs,
    ):
        operator = partial(
            XVolution,
            attention=attention,
            directions=directions,
            shift=shift,
            num_steps=num_steps,
            num_heads=num_heads,
            attn_kernel_size=attn_kernel_size,
            kernel_size=conv_kernel_size,
            backend=backend,
            norm_cfg=kwargs.get('norm_cfg'),
        )
        super().__init__(depth, operator, stage_with_xvolution, deploy, **kwargs)
