"""Attention weights from the concatenation of a query and the patch of keys around it (SAN)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import check_positive
from .reflection import reflect_pad


def patch_weights(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    norm: nn.Module,
    kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
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
        norm (nn.Module): ``nn.BatchNorm2d`` of R * (1 + k * k) channels; in training mode its
            running statistics are brought up to date as its own forward would.
        kernel_size (int): Side k of the neighbourhood, odd. Default: 7.
        stride (int): Keys between adjacent queries. Default: 1.
        dilation (int): Distance between the keys of a neighbourhood. Default: 1.

    Returns:
        Tensor: Shape (B, O, ceil(H / stride), ceil(W / stride)).

    Raises:
        ValueError: If an argument is not as described; the message names it.
    """
    check_positive('kernel_size', kernel_size, odd=True)
    check_positive('stride', stride)
    check_positive('dilation', dilation)
    batch, channels, height, width = key.shape
    expected = (batch, channels, (height + stride - 1) // stride, (width + stride - 1) // stride)
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
    if not isinstance(norm, nn.BatchNorm2d) or norm.num_features != inputs:
        raise ValueError(f'norm must be nn.BatchNorm2d of {inputs} channels, got {norm}')

    def rows(tensor: Tensor) -> list[Tensor]:
        """(R (1 + k k), ...) -> the query's part, then those of the patch's rows, (R k, ...)."""
        patch = tensor[channels:].unflatten(0, (channels, kernel_size, kernel_size))
        return [tensor[:channels], *(part.flatten(0, 1) for part in patch.unbind(1))]

    # nn.BatchNorm2d's own rules: statistics of the batch in training, or where it keeps none.
    batch_statistics = norm.training or norm.running_mean is None
    means, invstds = [], []
    padded = reflect_pad(key, kernel_size // 2 * dilation)
    geometry = (kernel_size, stride, dilation, *query.shape[-2:])
    parameters = zip(
        *(rows(t) for t in (weight.flatten(1).T, norm.weight, norm.bias)),
        *(
            [None] * (kernel_size + 1) if batch_statistics else rows(t)
            for t in (norm.running_mean, norm.running_var)
        ),
        strict=True,
    )
    out = 0
    for row, arguments in enumerate(parameters, start=-1):
        if row < 0:
            part, mean, invstd = _norm_relu_mix(query, *arguments, norm.eps)
        else:
            part, mean, invstd = checkpoint(
                _patch_row, padded, row, geometry, *arguments, norm.eps, use_reentrant=False
            )
        out = out + part
        means.append(mean)
        invstds.append(invstd)
    if norm.training and norm.track_running_stats:
        _update(norm, means, invstds, channels, kernel_size, query[:, 0].numel())
    return out


def _norm_relu_mix(
    maps: Tensor,
    columns: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, I, H, W) and (I, O) -> (B, O, H, W), and mean and inverse deviation of the maps."""
    maps, mean, invstd = torch.native_batch_norm(
        maps, scale, shift, mean, variance, mean is None, 0.0, eps
    )
    return F.conv2d(F.relu(maps), columns.T[:, :, None, None]), mean.detach(), invstd.detach()


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
    return _norm_relu_mix(torch.stack(patch, 2).flatten(1, 2), *arguments)


@torch.no_grad()
def _update(
    norm: nn.BatchNorm2d,
    means: list[Tensor],
    invstds: list[Tensor],
    channels: int,
    kernel_size: int,
    count: int,
) -> None:
    """Running statistics, as nn.BatchNorm2d keeps them: the variance is unbiased."""

    def join(parts: list[Tensor]) -> Tensor:
        patch = torch.stack([part.view(channels, kernel_size) for part in parts[1:]], 1)
        return torch.cat([parts[0], patch.flatten()])

    norm.num_batches_tracked.add_(1)
    factor = norm.momentum
    if factor is None:  # cumulative average
        factor = 1 / norm.num_batches_tracked.item()
    variance = join(invstds).pow(-2) - norm.eps
    variance *= count / max(count - 1, 1)
    norm.running_mean.lerp_(join(means).to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), factor)
