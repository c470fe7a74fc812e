"""SAN, self-attention networks, and SAN-ACmix."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..layers import PatchACmix, PatchAttention
from ..layers.checkpoint import checkpoint_module
from ..layers.norms import build_batch_norm
from ..models import deploy
from ..ops import norm_relu_conv
from ..ops._batch_norm import batch_norm, conv_batch_norm
from .base import Backbone, WarmStart, check_warm_start


def _halve(x: Tensor) -> Tensor:
    """2x2 max pool, sizes rounded up."""
    height, width = x.shape[-2:]
    if torch.compiler.is_compiling():  # sizes may be symbols, which ceil_mode would compare
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2)
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if differentiated or x.device.type != 'cpu' or height % 2 or width % 2:
        return F.max_pool2d(x, 2, ceil_mode=True)
    # PyTorch's kernel for CPUs, which also finds gradients their way, takes eight times as long.
    rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


class SANBlock(nn.Module):
    """Residual block of SAN: BN-ReLU, self-attention, BN-ReLU, 1x1 convolution, identity.

    Args:
        channels (int): Input and output channels C.
        attention (nn.Module): C to C / 4 channels.
        with_cp (bool): Compute the block anew in the backward pass, to save memory.
        norm_layer (Callable[[int], nn.Module]): Makes a batch norm of so many channels.
            Default: nn.BatchNorm2d.
    """

    operator_norms: ClassVar = {'sam': 'bn2'}  # for acmix_mm.deploy

    def __init__(
        self,
        channels: int,
        attention: nn.Module,
        with_cp: bool,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        self.bn1 = norm_layer(channels)
        self.sam = attention
        self.bn2 = norm_layer(channels // 4)
        self.conv = nn.Conv2d(channels // 4, channels, 1)
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if self.with_cp and x.requires_grad:
            return checkpoint_module(self, self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        out = self.sam(x, self.bn1)
        return norm_relu_conv(out, self.bn2, self.conv.weight, self.conv.bias).add_(x)


class SAN(Backbone, BaseModule):
    """Self-attention network with patchwise attention, of 10, 15 or 19 blocks.

    "Exploring Self-attention for Image Recognition", CVPR 2020, section 5, with the
    hyper-parameters and state-dict names of the authors' release. A stage halves the map with a 2x2
    max pool, widens it with a 1x1 convolution, and has residual blocks with kernels of 3 in the
    first stage and 7 in the others. Where it deviates: odd sizes are rounded up, so that any image
    works, and the classifier is left out.

    Args:
        depth (int): 10, 15 or 19.
        in_channels (int): Of the image. Default: 3.
        base_channels (int): Channels of the first stage, a multiple of 64 in the published
            networks; the others have 4, 8, 16 and 32 times as many. Default: 64.
        out_indices (Sequence[int]): Which of the last four stages to return, at strides 4, 8, 16
            and 32. Default: (0, 1, 2, 3).
        frozen_stages (int): Without gradient, norms in evaluation mode: -1 nothing, 0 the stem and
            the stage at stride 2, 1 to 4 also as many of the last four stages. Default: -1.
        norm_eval (bool): Batch norms keep their statistics in training. Default: True.
        norm_cfg (dict | None): Of all norms: ``type`` 'BN' or 'SyncBN', and their arguments, as
            OpenMMLab writes it. Default: None, for dict(type='BN').
        with_cp (bool): Compute blocks anew in the backward pass, to save memory. Default: False.
        backend (str | None): Of :func:`acmix_mm.ops.patch_weights` and
            :func:`acmix_mm.ops.local_aggregation`, and in ACmixSAN of
            :func:`acmix_mm.ops.group_conv`. Default: None.
        init_cfg (dict | list[dict] | None): Initialisation, as of all OpenMMLab modules.
            Default: None, for the layers' own.

    Inputs are images (B, in_channels, H, W) with H, W >= 1; outputs a tuple of maps, one for each
    of ``out_indices``, with 256, 512, 1024 and 2048 channels (at ``base_channels`` 64).

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    arch_settings: ClassVar = {10: (2, 1, 2, 4, 1), 15: (3, 2, 3, 5, 2), 19: (3, 3, 4, 6, 3)}
    kernel_sizes = (3, 7, 7, 7, 7)
    multipliers = (1, 4, 8, 16, 32)

    def __init__(
        self,
        depth: int,
        *,
        in_channels: int = 3,
        base_channels: int = 64,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = True,
        norm_cfg: dict | None = None,
        with_cp: bool = False,
        backend: str | None = None,
        init_cfg: dict | list[dict] | None = None,
    ):
        if depth not in self.arch_settings:
            raise ValueError(f'depth must be one of {tuple(self.arch_settings)}, got {depth!r}')
        if base_channels < 32 or base_channels % 32:
            raise ValueError(f'base_channels must be a multiple of 32, got {base_channels}')
        if not out_indices or not set(out_indices) <= set(range(4)):
            raise ValueError(f'out_indices must be of 0, 1, 2, 3, got {out_indices}')
        if frozen_stages not in range(-1, 5):
            raise ValueError(f'frozen_stages must be -1 to 4, got {frozen_stages}')
        super().__init__(init_cfg)
        self.depth = depth
        self.backend = backend
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.norm_cfg = norm_cfg
        self.relu = nn.ReLU(inplace=True)
        widths = [base_channels * m for m in self.multipliers]
        # Before the convolutions: mmcv's fuse_conv_bn takes a norm to follow the one before it.
        for i, channels in enumerate(widths):
            setattr(self, f'bn{i}', self.make_norm(channels))
        self.conv_in = nn.Conv2d(in_channels, base_channels, 1, bias=False)
        self.bn_in = self.make_norm(base_channels)
        before = base_channels
        for i, channels in enumerate(widths):
            setattr(self, f'conv{i}', nn.Conv2d(before, channels, 1, bias=False))
            layer = []
            for _ in range(self.arch_settings[depth][i]):
                attention = self.make_attention(channels, self.kernel_sizes[i])
                layer.append(SANBlock(channels, attention, with_cp, self.make_norm))
            setattr(self, f'layer{i}', nn.Sequential(*layer))
            before = channels
        self._freeze()

    def make_norm(self, channels: int) -> nn.Module:
        """A norm of that many channels."""
        return build_batch_norm(self.norm_cfg, channels)

    def make_attention(self, channels: int, kernel_size: int) -> nn.Module:
        """The operator of a block of that many channels."""
        return PatchAttention(
            channels,
            channels // 4,
            channels // 16,
            kernel_size,
            backend=self.backend,
            norm_layer=self.make_norm,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages in ``out_indices``."""
        x = self.relu(conv_batch_norm(x, self.conv_in, self.bn_in))
        outputs = []
        for i in range(5):
            conv, norm, layer = (getattr(self, f'{name}{i}') for name in ('conv', 'bn', 'layer'))
            x = self.relu(batch_norm(layer(conv(_halve(x))), norm))
            if i - 1 in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def train(self, mode: bool = True) -> nn.Module:
        """Training mode, with what is frozen and, if asked for, all norms kept in evaluation."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.conv_in, self.bn_in]
        for i in range(self.frozen_stages + 1):
            frozen += [getattr(self, f'{name}{i}') for name in ('conv', 'bn', 'layer')]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)


class ACmixSAN(WarmStart, SAN):
    """SAN-ACmix ("On the Integration of Self-Attention and Convolution", CVPR 2022).

    SAN with :class:`~acmix_mm.layers.PatchACmix` for every patchwise self-attention. No code was
    published for it; plain SAN's weights load, with ``fc``, ``dep_conv`` and the rates missing.
    With rate1 = 1 and rate2 = 0 the outputs are that network's.

    Args:
        depth (int): 10, 15 or 19.
        mix (str): How the paths are combined, see :class:`~acmix_mm.layers.MixedOperator`.
            Default: 'learned'.
        shift (str): How the convolution path shifts maps, see
            :class:`~acmix_mm.layers.MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): Kernels for the outputs of a head position, see the same; None
            is one each where they are learned. Default: None.
        conv_kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        warm_start (bool): Start as the plain network whose checkpoint ``init_cfg`` names, see
            :meth:`init_weights`; for ``mix='learned'``. Default: False.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves, for checkpoints of that
            form. Default: False.
        **kwargs: Of :class:`SAN`.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        depth: int,
        *,
        mix: str = 'learned',
        shift: str = 'learned',
        kernel_groups: int | None = None,
        conv_kernel_size: int = 3,
        warm_start: bool = False,
        deploy: bool = False,
        **kwargs,
    ):
        check_warm_start(warm_start, mix, deploy)
        self._acmix = {
            'mix': mix,
            'shift': shift,
            'kernel_groups': kernel_groups,
            'kernel_size': conv_kernel_size,
        }
        super().__init__(depth, **kwargs)
        self.warm_start = warm_start
        if deploy:
            self.switch_to_deploy()

    def make_attention(self, channels: int, kernel_size: int) -> nn.Module:
        return PatchACmix(
            channels,
            channels // 4,
            channels // 16,
            kernel_size,
            backend=self.backend,
            norm_layer=self.make_norm,
            **self._acmix,
        )

    def switch_to_deploy(self) -> None:
        """Fold what can be folded for inference, in place; a second call does nothing.

        See :func:`acmix_mm.deploy`.
        """
        deploy(self)
