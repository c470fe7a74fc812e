"""Depth-wise convolution between 1x1 convolutions, static or dynamic: the operator of DWNet."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import local_aggregation
from ..ops._checks import check_positive
from ..ops._dispatch import check_backend

REDUCTION = 4  # channels over hidden channels of the networks that predict kernels
GROUPS = 32  # of adjacent channels that share an inhomogeneous kernel
DYNAMIC = ('homogeneous', 'inhomogeneous')


class HomogeneousDepthwiseConv(nn.Module):
    """Depth-wise convolution whose kernels are predicted from the image as a whole.

    "On the Connection between Local Attention and Dynamic Depth-wise Convolution", ICLR 2022,
    section 3, with the state-dict names of the authors' release: global average pooling, 1x1
    convolution to C / 4 channels, BN, ReLU, 1x1 convolution to a kernel for each channel. As the
    release has it, a static bias is added. The map is padded with zeros.

    In training the norm has one value a channel and image, so a batch needs two images; across
    processes, SyncBN.

    Args:
        channels (int): Input and output channels C, at least 4.
        kernel_size (int): Side of the kernel, odd. Default: 7.
        norm_layer (Callable[[int], nn.Module]): Makes the norm of so many channels. Default:
            ``nn.BatchNorm2d``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        hidden = channels // REDUCTION
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn = norm_layer(hidden)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(hidden, channels * kernel_size**2, 1)
        self.bias = nn.Parameter(self.conv2.bias.new_zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        kernel = self.conv2(self.relu(self.bn(self.conv1(self.pool(x)))))
        if not len(x):  # a convolution cannot have no groups
            return x + kernel.sum() + self.bias.view(-1, 1, 1)
        # A kernel for each image and channel: all images side by side as groups of one convolution.
        kernel = kernel.reshape(-1, 1, self.kernel_size, self.kernel_size)
        out = F.conv2d(
            x.flatten(0, 1)[None],
            kernel,
            self.bias.repeat(x.size(0)),
            padding=self.kernel_size // 2,
            groups=kernel.size(0),
        )
        return out.view(x.shape)

    def extra_repr(self) -> str:
        return f'{len(self.bias)}, kernel_size={self.kernel_size}'


class InhomogeneousDepthwiseConv(nn.Module):
    """Depth-wise convolution whose kernels are predicted at each position, from that position.

    The source is that of :class:`HomogeneousDepthwiseConv`. There the kernels are predicted by a
    1x1 convolution to C / 4 channels, BN, ReLU and a 1x1 convolution. The paper lets the channels
    of a group share a kernel, as a head's do in attention; the release has 32 groups of adjacent
    channels, whatever their number (3, 6, 12 and 24 channels share in the stages of the tiny
    network), the first 1x1 convolution has a bias, the result has none, and the map is padded with
    zeros. State-dict names are the release's.

    Args:
        channels (int): Input and output channels C, a multiple of 32.
        kernel_size (int): Side of the kernel, odd. Default: 7.
        norm_layer (Callable[[int], nn.Module]): Makes the norm of so many channels. Default:
            ``nn.BatchNorm2d``.
        backend (str | None): Of :func:`acmix_mm.ops.local_aggregation`. Default: None.

    Raises:
        ValueError: If channels is not a multiple of 32, or backend no backend's name.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        backend: str | None = None,
    ):
        super().__init__()
        if channels % GROUPS:
            raise ValueError(f'channels must be a multiple of {GROUPS}, got {channels}')
        check_backend(backend)
        self.kernel_size = kernel_size
        self.backend = backend
        hidden = channels // REDUCTION
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            norm_layer(hidden),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, GROUPS * kernel_size**2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        weight = self.conv2(self.conv1(x)).to(x.dtype)
        # Groups count as images: adjacent channels share, where local_aggregation interleaves.
        weight = weight.unflatten(1, (GROUPS, 1, -1)).flatten(0, 1)
        value = x.unflatten(1, (GROUPS, -1)).flatten(0, 1)
        out = local_aggregation(
            value, weight, self.kernel_size, padding_mode='zeros', backend=self.backend
        )
        return out.view(x.shape)

    def extra_repr(self) -> str:
        return f'kernel_size={self.kernel_size}, backend={self.backend!r}'


class DepthwiseBlock(nn.Module):
    """1x1 conv-BN-ReLU, depth-wise conv-BN-ReLU, 1x1 conv-BN: what DWNet has for local attention.

    "On the Connection between Local Attention and Dynamic Depth-wise Convolution", ICLR 2022,
    sections 3 and 4, with the state-dict names of the authors' release.

    Args:
        channels (int): Input and output channels C; with a dynamic kernel at least 4.
        kernel_size (int): Side of the depth-wise kernel, odd. Default: 7.
        dynamic (str | None): None for a static kernel, 'homogeneous' for one predicted from the
            whole image, 'inhomogeneous' for one predicted at each position, where C must be a
            multiple of 32. Default: None.
        norm_layer (Callable[[int], nn.Module]): Makes the norms, of so many channels. Default:
            ``nn.BatchNorm2d``.
        backend (str | None): Of :func:`acmix_mm.ops.local_aggregation`, for 'inhomogeneous'.
            Default: None.

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        dynamic: str | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
        backend: str | None = None,
    ):
        super().__init__()
        check_positive('kernel_size', kernel_size, odd=True)
        if dynamic is not None and dynamic not in DYNAMIC:
            raise ValueError(f'dynamic must be None or one of {DYNAMIC}, got {dynamic!r}')
        check_positive('channels', channels)
        check_backend(backend)
        if dynamic and channels < REDUCTION:
            raise ValueError(f'channels must be at least {REDUCTION}, got {channels}')
        self.conv0 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn0 = norm_layer(channels)
        if dynamic == 'inhomogeneous':
            self.conv = InhomogeneousDepthwiseConv(channels, kernel_size, norm_layer, backend)
        elif dynamic:
            self.conv = HomogeneousDepthwiseConv(channels, kernel_size, norm_layer)
        else:
            self.conv = nn.Conv2d(
                channels, channels, kernel_size, padding=kernel_size // 2, groups=channels
            )
        self.bn = norm_layer(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = norm_layer(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.relu(self.bn0(self.conv0(x)))
        x = self.relu(self.bn(self.conv(x)))
        return self.bn2(self.conv2(x))
