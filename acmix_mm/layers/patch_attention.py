"""Patchwise self-attention of SAN, and its mix with convolution."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import local_aggregation, norm_relu_conv, patch_weights
from ..ops._checks import check_positive
from ..ops._dispatch import check_backend
from .mixed_operator import MixedOperator

SHARE_CHANNELS = 8  # value channels that one weight serves


class PatchAttention(nn.Module):
    """Patchwise self-attention module of "Exploring Self-attention for Image Recognition".

    CVPR 2020, sections 3.2 and 4. A small network maps the query and the patch of keys around it to
    the weights by which the patch of values is summed; there is no softmax. State-dict names are
    those of the authors' release.

    Args:
        in_channels (int): Input channels C.
        out_channels (int): Output channels, a multiple of 8: each weight serves 8 channels. SAN
            takes C / 4.
        qk_channels (int): Channels of query and key each. SAN takes C / 16.
        kernel_size (int): Side of the neighbourhood, odd. Default: 7.
        backend (str | None): Of :func:`acmix_mm.ops.patch_weights` and
            :func:`acmix_mm.ops.local_aggregation`. Default: None.
        norm_layer (Callable[[int], nn.Module]): Makes a norm of so many channels: nn.BatchNorm2d,
            nn.SyncBatchNorm or a subclass that keeps their forward. Default: nn.BatchNorm2d.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        qk_channels: int,
        kernel_size: int = 7,
        backend: str | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        check_positive('kernel_size', kernel_size, odd=True)
        check_backend(backend)
        _check_channels(in_channels, out_channels, qk_channels)
        self.kernel_size = kernel_size
        self.backend = backend
        self.conv1 = nn.Conv2d(in_channels, qk_channels, 1)
        self.conv2 = nn.Conv2d(in_channels, qk_channels, 1)
        self.conv3 = nn.Conv2d(in_channels, out_channels, 1)
        patch = qk_channels * (1 + kernel_size**2)
        groups = out_channels // SHARE_CHANNELS
        self.conv_w = nn.Sequential(
            norm_layer(patch),
            nn.ReLU(),
            nn.Conv2d(patch, groups, 1, bias=False),
            norm_layer(groups),
            nn.ReLU(),
            nn.Conv2d(groups, kernel_size**2 * groups, 1),
        )

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W); ``norm``, and a ReLU, come before if given."""
        projections = (self.conv1, self.conv2, self.conv3)
        maps = project(x, projections, norm)
        query, key, value = maps.split([conv.out_channels for conv in projections], 1)
        return attend(self.conv_w, query, key, value, self.kernel_size, self.backend)

    def extra_repr(self) -> str:
        return (
            f'{self.conv1.in_channels}, {self.conv3.out_channels}, '
            f'qk_channels={self.conv1.out_channels}, kernel_size={self.kernel_size}, '
            f'backend={self.backend!r}'
        )


def _check_channels(in_channels: int, out_channels: int, qk_channels: int) -> None:
    check_positive('in_channels', in_channels)
    check_positive('qk_channels', qk_channels)
    if not isinstance(out_channels, int) or out_channels < 1 or out_channels % SHARE_CHANNELS:
        raise ValueError(
            f'out_channels must be a multiple of {SHARE_CHANNELS}, got {out_channels!r}'
        )
    check_positive('out_channels', out_channels)


def project(
    x: Tensor,
    projections: tuple[nn.Conv2d, ...],
    norm: nn.Module | None,
    order: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """1x1 convolutions as one, after batch norm and ReLU if there are any.

    ``order`` permutes the output channels by their weights and biases: permuting maps costs a pass
    over memory.
    """
    weight = torch.cat([conv.weight for conv in projections])
    bias = torch.cat([conv.bias for conv in projections])
    if order is not None:
        weight, bias = order(weight), order(bias)
    return F.conv2d(x, weight, bias) if norm is None else norm_relu_conv(x, norm, weight, bias)


def patchwise_weights(
    conv_w: nn.Sequential,
    query: Tensor,
    key: Tensor,
    kernel_size: int,
    backend: str | None = None,
    then: Callable[..., Tensor] | None = None,
    *args,
) -> Tensor:
    """Weights of the neighbourhoods from query and key by the network ``conv_w``.

    (B, G * k * k, H, W) for G groups of channels; or what ``then`` makes of them and ``args``.
    """
    patch_norm, _, mix, norm, _, expand = conv_w
    weights = patch_weights(query, key, mix.weight, patch_norm, kernel_size, backend=backend)
    if mix.bias is not None:  # of a norm that has been folded into it
        weights = weights + mix.bias.to(weights.dtype).view(-1, 1, 1)
    return norm_relu_conv(weights, norm, expand.weight, expand.bias, then, *args)


def attend(
    conv_w: nn.Sequential,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    backend: str | None = None,
) -> Tensor:
    """The sum of values by :func:`patchwise_weights`.

    Value may have more than one dimension of channels, (B, ..., H, W); they count as one.
    """

    def aggregate(weights: Tensor, value: Tensor) -> Tensor:
        weights = weights.unflatten(1, (-1, kernel_size**2)).to(value.dtype)
        return local_aggregation(value.flatten(1, -3), weights, kernel_size, backend=backend)

    return patchwise_weights(conv_w, query, key, kernel_size, backend, aggregate, value)


class PatchACmix(MixedOperator):
    """Mix of patchwise self-attention and convolution over shared projections.

    "On the Integration of Self-Attention and Convolution", CVPR 2022, sections 4 and 5.1. Values
    have four times the channels of query and key, so they count as four maps: ``fc`` takes 6 maps,
    query, key and four groups of values. No code was published for it; channel orders are those of
    the release's other operators. There is no position encoding.

    Args:
        in_channels (int): Input channels C.
        out_channels (int): Output channels, four times ``qk_channels`` and a multiple of 8.
        qk_channels (int): Channels of query and key each.
        attn_kernel_size (int): Side of the attention's neighbourhood, odd. Default: 7.
        kernel_size (int): Side of the convolution path's kernel, odd. Default: 3.
        mix (str): See :class:`MixedOperator`. Default: 'learned'.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`,
            :func:`acmix_mm.ops.patch_weights` and :func:`acmix_mm.ops.local_aggregation`.
            Default: None.
        norm_layer (Callable[[int], nn.Module]): See :class:`PatchAttention`.
            Default: nn.BatchNorm2d.
        shift (str): See :class:`MixedOperator`. Default: 'learned'.
        kernel_groups (int | None): See :class:`MixedOperator`. Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        qk_channels: int,
        attn_kernel_size: int = 7,
        kernel_size: int = 3,
        mix: str = 'learned',
        backend: str | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        *,
        shift: str = 'learned',
        kernel_groups: int | None = None,
    ):
        check_positive('attn_kernel_size', attn_kernel_size, odd=True)
        _check_channels(in_channels, out_channels, qk_channels)
        if out_channels != 4 * qk_channels:
            raise ValueError(
                f'out_channels must be four times qk_channels ({qk_channels}), got {out_channels}'
            )
        super().__init__(
            out_channels,
            num_maps=6,
            head_dim=qk_channels,
            kernel_size=kernel_size,
            mix=mix,
            backend=backend,
            shift=shift,
            kernel_groups=kernel_groups,
        )
        attention = PatchAttention(
            in_channels, out_channels, qk_channels, attn_kernel_size, norm_layer=norm_layer
        )
        self.kernel_size = kernel_size
        self.attn_kernel_size = attn_kernel_size
        # Its parts under its names, so that weights of the plain network load.
        self.conv1, self.conv2, self.conv3 = attention.conv1, attention.conv2, attention.conv3
        if self.with_attention:  # DistributedDataParallel refuses parameters without gradient
            self.conv_w = attention.conv_w

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W); ``norm``, and a ReLU, come before if given."""
        projections = (self.conv1, self.conv2, self.conv3)
        maps = project(x, projections, norm, self._by_position).unflatten(1, (-1, 6))
        attention = None
        if self.with_attention:
            query, key, value = maps[:, :, 0], maps[:, :, 1], maps[:, :, 2:].transpose(1, 2)
            attention = attend(self.conv_w, query, key, value, self.attn_kernel_size, self.backend)
        return self.mixing_weights().mix(maps, attention, self.backend)

    def extra_repr(self) -> str:
        return (
            f'{self.conv1.in_channels}, {self.conv3.out_channels}, '
            f'qk_channels={self.conv1.out_channels}, attn_kernel_size={self.attn_kernel_size}, '
            f'kernel_size={self.kernel_size}, {super().extra_repr()}'
        )

    @staticmethod
    def _by_position(channels: Tensor) -> Tensor:
        """From (map, position) to (position, map), as the convolution path wants it."""
        return channels.unflatten(0, (6, -1)).transpose(0, 1).flatten(0, 1)
