"""ResNet-ACmix: mmdet's ResNet with a mixed operator for every 3x3 convolution."""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from mmdet.models.backbones.resnet import Bottleneck

from ..layers import ACmix
from .operator_resnet import OperatorResNet


class ACmixResNet(OperatorResNet):
    """ResNet-ACmix ("On the Integration of Self-Attention and Convolution", CVPR 2022).

    Depths and hyper-parameters are those of the authors' release: blocks (1, 2, 4, 1),
    (2, 3, 5, 2) and (3, 4, 6, 3) for 26, 38 and 50, 4 heads, a 7x7 attention window, a 3x3
    convolution path. Depth 101 uses ResNet-101's (3, 4, 23, 3). State-dict names are the release's.

    Args:
        depth (int): 26, 38, 50 or 101.
        num_heads (int): Attention heads. Default: 4.
        attn_kernel_size (int): Side of the attention's neighbourhood, odd. Default: 7.
        conv_kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        mix (str): How the paths are combined, see :class:`~acmix_mm.layers.MixedOperator`.
            Default: 'learned'.
        shift (str): How the convolution path shifts maps, see
            :class:`~acmix_mm.layers.MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): Kernels for the outputs of a head position, see the same; None
            is one each where they are learned. Default: None.
        backend (str | None): Of :func:`acmix_mm.ops.local_attention`. Default: None.
        stage_with_acmix (Sequence[bool]): Which stages are mixed; the others keep their
            convolutions, so that all False is the plain ResNet of the same depth.
            Default: all stages.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves, for checkpoints of that
            form. Default: False.
        **kwargs: All other arguments of mmdet's ResNet, with its defaults, but ``dcn`` and
            ``stage_with_dcn``.

    Inputs are images (B, in_channels, H, W) with H, W >= 1; outputs a tuple of maps, one for each
    of ``out_indices``, with 256, 512, 1024 and 2048 channels (at ``base_channels`` 64) at strides
    4, 8, 16 and 32.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    arch_settings: ClassVar = {
        26: (Bottleneck, (1, 2, 4, 1)),
        38: (Bottleneck, (2, 3, 5, 2)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
    }
    stages_argument = 'stage_with_acmix'

    def __init__(
        self,
        depth: int,
        *,
        num_heads: int = 4,
        attn_kernel_size: int = 7,
        conv_kernel_size: int = 3,
        mix: str = 'learned',
        shift: str = 'learned',
        kernel_groups: int | None = None,
        backend: str | None = None,
        stage_with_acmix: Sequence[bool] = (True, True, True, True),
        deploy: bool = False,
        **kwargs,
    ):
        operator = partial(
            ACmix,
            num_heads=num_heads,
            attn_kernel_size=attn_kernel_size,
            kernel_size=conv_kernel_size,
            mix=mix,
            shift=shift,
            kernel_groups=kernel_groups,
            backend=backend,
        )
        super().__init__(depth, operator, stage_with_acmix, deploy, **kwargs)
