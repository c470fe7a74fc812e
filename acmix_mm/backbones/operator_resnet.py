"""mmdet's ResNet with another operator for the 3x3 convolutions of chosen stages."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from mmcv.cnn.utils.fuse_conv_bn import fuse_conv_bn
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..models import deploy
from .base import Backbone


class OperatorBlock:
    """What the two blocks share: which norm follows which operator, see acmix_mm.deploy."""

    @property
    def operator_norms(self) -> dict[str, str]:
        return {'conv1': self.norm1_name, 'conv2': self.norm2_name}


class OperatorBasicBlock(OperatorBlock, BasicBlock):
    """mmdet's basic block with another operator for both convolutions.

    Args:
        *args: Of :class:`mmdet.models.backbones.resnet.BasicBlock`.
        operator (Callable[..., nn.Module]): Makes the operator; called as nn.Conv2d would be, with
            channels in and out, ``stride`` and ``dilation``.
        **kwargs: Of :class:`mmdet.models.backbones.resnet.BasicBlock`.
    """

    def __init__(self, *args, operator: Callable[..., nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        for name in ('conv1', 'conv2'):
            conv = getattr(self, name)
            channels = (conv.in_channels, conv.out_channels)
            setattr(self, name, operator(*channels, stride=conv.stride, dilation=conv.dilation))


class OperatorBottleneck(OperatorBlock, Bottleneck):
    """mmdet's bottleneck with another operator for the 3x3 convolution.

    Args:
        *args: Of :class:`mmdet.models.backbones.resnet.Bottleneck`.
        operator (Callable[..., nn.Module]): See :class:`OperatorBasicBlock`.
        **kwargs: Of :class:`mmdet.models.backbones.resnet.Bottleneck`.
    """

    def __init__(self, *args, operator: Callable[..., nn.Module], **kwargs):
        super().__init__(*args, **kwargs)
        self.conv2 = operator(
            self.planes, self.planes, stride=self.conv2_stride, dilation=self.dilation
        )


class OperatorResNet(Backbone, ResNet):
    """mmdet's ResNet with another operator for the 3x3 convolutions of chosen stages.

    Subclasses set ``arch_settings``, name the argument by which users choose stages, and are
    registered.

    Args:
        depth (int): One of ``arch_settings``.
        operator (Callable[..., nn.Module]): See :class:`OperatorBasicBlock`. What it makes has
            ``switch_to_deploy(norm=None)``, as :class:`~acmix_mm.layers.MixedOperator` has it.
        stages (Sequence[bool]): Which stages have it; the others keep their convolutions.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves. Default: False.
        **kwargs: All other arguments of mmdet's ResNet, with its defaults, but ``dcn`` and
            ``stage_with_dcn``.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    stages_argument: ClassVar[str]

    # ResNet compares the block class with mmdet's two to choose which norm starts at zero, so the
    # blocks with the operator come in with make_res_layer only.
    operator_blocks: ClassVar = {BasicBlock: OperatorBasicBlock, Bottleneck: OperatorBottleneck}

    def __init__(
        self,
        depth: int,
        operator: Callable[..., nn.Module],
        stages: Sequence[bool],
        deploy: bool = False,
        **kwargs,
    ):
        if depth not in self.arch_settings:
            raise ValueError(f'depth must be one of {tuple(self.arch_settings)}, got {depth!r}')
        if kwargs.get('dcn') is not None:
            raise ValueError(
                f'dcn must be None, got {kwargs["dcn"]}: another operator stands where it would; '
                f'choose its stages with {self.stages_argument}'
            )
        num_stages = kwargs.get('num_stages', 4)
        if len(stages) < num_stages:
            raise ValueError(
                f'{self.stages_argument} must have a value for each of {num_stages} stages, '
                f'got {stages}'
            )
        self._operator = operator
        self._operator_stages = tuple(stages)
        super().__init__(depth, **kwargs)
        if deploy:
            self.switch_to_deploy()

    def switch_to_deploy(self) -> None:
        """Fold what can be folded for inference, in place; a second call does nothing.

        See :func:`acmix_mm.deploy`; also convolutions with the batch norms after them.
        """
        deploy(self)

    def fuse_convolutions(self) -> None:
        """Fold batch norms into the convolutions before them."""
        # Other types, such as ConvWS, change their weights in forward: no norm fits into those.
        if (self.conv_cfg or {'type': 'Conv2d'})['type'] in ('Conv', 'Conv2d'):
            fuse_conv_bn(self)

    def make_res_layer(self, block: type[nn.Module], **kwargs) -> nn.Module:
        """A stage; arguments as mmdet's."""
        if self._operator_stages[len(self.res_layers)]:
            block = self.operator_blocks[block]
            kwargs['operator'] = self._operator
        return super().make_res_layer(block=block, **kwargs)
