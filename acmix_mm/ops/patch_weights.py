"""Attention weights from the concatenation of a query and the patch of keys around it (SAN)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backends import native_backend
from .checks import check_geometry, strided_size
from .dispatch import OPERATORS, Implementation, select
from .norm_relu_conv import fixed_statistics, normalised_conv, update_statistics
from .reflection import reflect_pad


def patch_weights(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    norm: nn.Module,
    kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Batch norm, ReLU and a 1x1 convolution of ``concat(query, patch of key)``, without the patch.

    The first half of the mapping from features to patchwise attention weights in "Exploring
    Self-attention for Image Recognition" (CVPR 2020, section 3.2, and its released code). Each of
    the k * k copies of a key channel has a scale, a shift and statistics of its own, and the ReLU
    comes before the convolution, so this is no convolution of the key. It is worked off by rows of
    the neighbourhood, and the backward pass computes each row anew: nothing of the patch's size
    ever exists, and training keeps query and padded key only.

    Args:
        query (Tensor): Shape (B, R, ceil(H / stride), ceil(W / stride)).
        key (Tensor): Shape (B, R, H, W), H, W >= 1; reflected at the border.
        weight (Tensor): Shape (O, R * (1 + k * k), 1, 1); input channels are the query's, then
            ``channel * k * k + position`` for the key's.
        norm (nn.Module): ``nn.BatchNorm2d`` of R * (1 + k * k) channels, affine; in training mode
            its running statistics are brought up to date as its own forward would.
        kernel_size (int): Side k of the neighbourhood, odd. Default: 7.
        stride (int): Keys between adjacent queries. Default: 1.
        dilation (int): Distance between the keys of a neighbourhood. Default: 1.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' has a kernel for
            inference, all else is PyTorch. Default: None.

    Returns:
        Tensor: Shape (B, O, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """
    check_geometry(kernel_size, stride, dilation)
    channels = key.size(1)
    expected = (*key.shape[:2], *strided_size(key, stride))
    if tuple(query.shape) != expected:
        raise ValueError(
            f'query must have shape {expected} for key of shape {tuple(key.shape)} and stride '
            f'{stride}, got {tuple(query.shape)}'
        )
    inputs = channels * (1 + kernel_size**2)
    if weight.size(1) != inputs:
        raise ValueError(
            f'weight must have {inputs} input channels for key of shape {tuple(key.shape)} and '
            f'kernel_size {kernel_size}, got {weight.size(1)}'
        )
    if not isinstance(norm, nn.BatchNorm2d) or norm.num_features != inputs or not norm.affine:
        raise ValueError(f'norm must be nn.BatchNorm2d of {inputs} channels, affine, got {norm}')

    def rows(tensor: Tensor) -> list[Tensor]:
        """(R (1 + k k), ...) -> the query's part, then those of the patch's rows, (R k, ...)."""
        patch = tensor[channels:].unflatten(0, (channels, kernel_size, kernel_size))
        return [tensor[:channels], *(part.flatten(0, 1) for part in patch.unbind(1))]

    mean, variance = fixed_statistics(norm)
    fixed = mean is not None
    padded = reflect_pad(key, kernel_size // 2 * dilation)
    if fixed and _has_kernel(query, key, weight, backend):
        scale = norm.weight * (variance + norm.eps).rsqrt()
        shift = norm.bias - mean * scale
        weight = weight.flatten(1)
        own = [t[:channels].view(-1, 1, 1) for t in (scale, shift)]
        out = F.conv2d((query * own[0] + own[1]).relu_(), weight[:, :channels, None, None])
        rest = (scale[channels:], shift[channels:], weight.T[channels:])
        return out + native_backend.patch_weights(padded, *rest, kernel_size, stride, dilation)
    geometry = (kernel_size, stride, dilation, *query.shape[-2:])
    parameters = zip(
        *(rows(t) for t in (weight.flatten(1).T, norm.weight, norm.bias)),
        *(rows(t) if fixed else [None] * (kernel_size + 1) for t in (mean, variance)),
        strict=True,
    )
    out, means, invstds = 0, [], []
    for row, (columns, *arguments) in enumerate(parameters, start=-1):
        arguments = (columns.T[:, :, None, None], None, *arguments, norm.eps)
        if row < 0:
            part, mean, invstd = normalised_conv(query, *arguments)
        elif torch.is_grad_enabled():
            part, mean, invstd = checkpoint(
                _patch_row, padded, row, geometry, *arguments, use_reentrant=False
            )
        else:
            part, mean, invstd = _patch_row(padded, row, geometry, *arguments)
        out = out + part
        means.append(mean)
        invstds.append(invstd)
    if not fixed:
        join = partial(_join_rows, channels=channels, kernel_size=kernel_size)
        update_statistics(norm, join(means), join(invstds), query[:, 0].numel())
    return out


def _has_kernel(query: Tensor, key: Tensor, weight: Tensor, backend: str | None) -> bool:
    """Does the native kernel serve? It has one dtype and no gradients."""
    same = query.dtype == key.dtype == weight.dtype in (torch.float32, torch.float64)
    autocast = torch.is_autocast_enabled(key.device.type)
    return (
        select('patch_weights', backend, key) == 'native'
        and same
        and not autocast
        and not torch.is_grad_enabled()
    )


def _join_rows(parts: list[Tensor], channels: int, kernel_size: int) -> Tensor:
    """The query's values and those of the patch's rows, in the order of the channels."""
    patch = torch.stack([part.view(channels, kernel_size) for part in parts[1:]], 1)
    return torch.cat([parts[0], patch.flatten()])


def _patch_row(
    padded: Tensor, row: int, geometry: tuple[int, ...], *arguments
) -> tuple[Tensor, Tensor, Tensor]:
    kernel_size, stride, dilation, height, width = geometry
    top = row * dilation
    strip = padded[..., top : top + (height - 1) * stride + 1 : stride, :]
    patch = [
        strip[..., left : left + (width - 1) * stride + 1 : stride]
        for left in range(0, kernel_size * dilation, dilation)
    ]
    return normalised_conv(torch.stack(patch, 2).flatten(1, 2), *arguments)


# Stand-ins until the rows and the kernel have one signature.
OPERATORS['patch_weights'] = {
    'torch': Implementation(patch_weights),
    'native': Implementation(native_backend.patch_weights, native_backend.refuses),
}
