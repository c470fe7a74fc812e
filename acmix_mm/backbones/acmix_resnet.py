"""ResNet-ACmix: mmdet's ResNet with a mixed operator for every 3x3 convolution."""

from collections.abc import Sequence
from typing import ClassVar

from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn
from mmdet.models.backbones.resnet import Bottleneck, ResNet
from mmengine.registry import MODELS
from torch import nn

from ..layers import ACmix


class ACmixBottleneck(Bottleneck):
    """mmdet's bottleneck with :class:`~acmix_mm.layers.ACmix` for the 3x3 convolution.

    Args:
        acmix (dict): Keyword arguments of ``ACmix`` beyond those of a convolution.
        *args: Of :class:`mmdet.models.backbones.resnet.Bottleneck`.
        **kwargs: Of the same.
    """

    def __init__(self, *args, acmix: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv2 = ACmix(
            self.planes,
            self.planes,
            stride=self.conv2_stride,
            dilation=self.dilation,
            **acmix,
        )

    def switch_to_deploy(self) -> None:
        """Fold the mixed operator for inference, with the batch norm after it, in place."""
        norm = self.norm2 if isinstance(self.norm2, nn.modules.batchnorm._BatchNorm) else None
        self.conv2.switch_to_deploy(norm)
        if norm is not None:
            setattr(self, self.norm2_name, nn.Identity())


@MODELS.register_module()
class ACmixResNet(ResNet):
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

    # ResNet compares the block class with Bottleneck to choose which norm starts at zero, so the
    # mixed block comes in with make_res_layer only.
    arch_settings: ClassVar = {
        26: (Bottleneck, (1, 2, 4, 1)),
        38: (Bottleneck, (2, 3, 5, 2)),
        50: (Bottleneck, (3, 4, 6, 3)),
        101: (Bottleneck, (3, 4, 23, 3)),
    }

    def __init__(
        self,
        depth: int,
        *,
        num_heads: int = 4,
        attn_kernel_size: int = 7,
        conv_kernel_size: int = 3,
        mix: str = 'learned',
        backend: str | None = None,
        stage_with_acmix: Sequence[bool] = (True, True, True, True),
        deploy: bool = False,
        **kwargs,
    ):
        if depth not in self.arch_settings:
            raise ValueError(f'depth must be one of {tuple(self.arch_settings)}, got {depth!r}')
        if kwargs.get('dcn') is not None:
            raise ValueError(
                f'dcn must be None, got {kwargs["dcn"]}: ACmix stands where it would; choose its '
                'stages with stage_with_acmix'
            )
        num_stages = kwargs.get('num_stages', 4)
        if len(stage_with_acmix) < num_stages:
            raise ValueError(
                f'stage_with_acmix must have a value for each of {num_stages} stages, '
                f'got {stage_with_acmix}'
            )
        self.stage_with_acmix = tuple(stage_with_acmix)
        self._acmix = {
            'num_heads': num_heads,
            'attn_kernel_size': attn_kernel_size,
            'kernel_size': conv_kernel_size,
            'mix': mix,
            'backend': backend,
        }
        super().__init__(depth, **kwargs)
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Fold what can be folded for inference, in place; a second call does nothing.

        Mixed operators with the batch norms after them, see
        :meth:`acmix_mm.layers.MixedOperator.switch_to_deploy`, and convolutions with theirs. The
        outputs of the backbone in evaluation mode stay the same within rounding.
        """
        for block in self.modules():
            if isinstance(block, ACmixBottleneck):
                block.switch_to_deploy()
        # Other types, such as ConvWS, change their weights in forward: no norm fits into those.
        if (self.conv_cfg or {'type': 'Conv2d'})['type'] in ('Conv', 'Conv2d'):
            fuse_conv_bn(self)

    def make_res_layer(self, block: type[nn.Module], **kwargs) -> nn.Module:
        """A stage; arguments as mmdet's."""
        if self.stage_with_acmix[len(self.res_layers)]:
            return super().make_res_layer(block=ACmixBottleneck, acmix=self._acmix, **kwargs)
        return super().make_res_layer(block=block, **kwargs)
