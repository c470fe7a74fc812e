"""Attention weights from the concatenation of a query and the patch of keys around it (SAN)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._batch_norm import (
    batch_norm_affine,
    is_batch_norm,
    local_statistics,
    prepare_statistics,
    recomputed,
    update_statistics,
)
from ._checks import check_dtypes, check_geometry, check_shape, check_tensors, strided_size
from ._dispatch import OPERATORS, Implementation, autocasts, dispatch
from ._reflection import reflect_pad
from .backends import native_backend
from .norm_relu_conv import normalised_conv


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
        norm (nn.Module): ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` of R * (1 + k * k) channels, or
            a subclass that keeps their forward; in training mode its running statistics are brought
            up to date as its own forward would. Synchronised statistics work on the CPU, too.
        kernel_size (int): Side k of the neighbourhood, odd. Default: 7.
        stride (int): Keys between adjacent queries. Default: 1.
        dilation (int): Distance between the keys of a neighbourhood. Default: 1.
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' has a kernel for
            inference, all else is PyTorch. Default: None.

    Returns:
        Tensor: Shape (B, O, ceil(H / stride), ceil(W / stride)).

    Raises:
        TypeError: If query, key or weight is not a floating-point tensor.
        ValueError: If an argument is not as described; the message names it. Also for a batch with
            one value a channel, from whose statistics ``norm`` is to take its own, as
            nn.BatchNorm2d has it.
    """
    check_geometry(kernel_size, stride, dilation)
    check_tensors(query=query, key=key, weight=weight)
    if key.dim() != 4 or min(key.shape[1:]) < 1:
        raise ValueError(
            f'key must have shape (B, R, H, W) with R, H, W >= 1, got {tuple(key.shape)}'
        )
    channels = key.size(1)
    expected = (*key.shape[:2], *strided_size(key, stride))
    why = f'key of shape {tuple(key.shape)} and stride {stride}'
    check_shape('query', query, expected, why)
    inputs = channels * (1 + kernel_size**2)
    if weight.dim() != 4 or weight.size(0) < 1 or weight.shape[1:] != (inputs, 1, 1):
        raise ValueError(
            f'weight must have shape (O, {inputs}, 1, 1) for key of shape {tuple(key.shape)} and '
            f'kernel_size {kernel_size}, got {tuple(weight.shape)}'
        )
    if not is_batch_norm(norm) or norm.num_features != inputs:
        raise ValueError(
            f'norm must be nn.BatchNorm2d or nn.SyncBatchNorm, with its forward, of {inputs} '
            f'channels, got {type(norm).__name__} of {getattr(norm, "num_features", "unknown")}'
        )
    norm._check_input_dim(key)
    check_dtypes(query=query, key=key, weight=None if autocasts(key) else weight)

    padded = reflect_pad(key, kernel_size // 2 * dilation)
    geometry = (kernel_size, stride, dilation)

    def local() -> tuple[Tensor, Tensor]:
        """Of the query and of each of the patch's rows, in the order of the channels."""
        parts = [recomputed(local_statistics, query)]
        for row in range(kernel_size):
            size = query.shape[-2:]
            parts.append(recomputed(_row_statistics, padded, row, (*geometry, *size)))
        means, variances = zip(*parts, strict=True)
        return _join(means, kernel_size), _join(variances, kernel_size)

    statistics = prepare_statistics(norm, query[:, 0].numel(), local)
    return dispatch('patch_weights', backend, query, padded, weight, norm, statistics, geometry)


def _rows(tensor: Tensor | None, channels: int, kernel_size: int) -> list[Tensor | None]:
    """(R (1 + k k), ...) -> the query's part, then those of the patch's rows, (R k, ...)."""
    if tensor is None:
        return [None] * (kernel_size + 1)
    patch = tensor[channels:].unflatten(0, (channels, kernel_size, kernel_size))
    return [tensor[:channels], *(part.flatten(0, 1) for part in patch.unbind(1))]


def _join(parts: Sequence[Tensor], kernel_size: int) -> Tensor:
    """The inverse of :func:`_rows`, for vectors."""
    patch = torch.stack([part.view(-1, kernel_size) for part in parts[1:]], 1)
    return torch.cat([parts[0], patch.flatten()])


def _by_rows(
    query: Tensor,
    padded: Tensor,
    weight: Tensor,
    norm: nn.Module,
    statistics: tuple,
    geometry: tuple[int, int, int],
) -> Tensor:
    """Row by row of the neighbourhood; ``statistics`` are those of :func:`prepare_statistics`."""
    kernel_size = geometry[0]
    source, mean, variance = statistics
    parameters = [
        _rows(tensor, query.size(1), kernel_size)
        for tensor in (weight.flatten(1).T, norm.weight, norm.bias, mean, variance)
    ]
    out, batch = 0, []
    for row, (columns, scale, shift, *fixed) in enumerate(zip(*parameters, strict=True), -1):
        columns = columns.T[:, :, None, None]
        arguments = (columns, None, scale, shift, norm.eps, source, *fixed)
        if row < 0:
            part, *new = normalised_conv(query, *arguments)
        else:
            place = (*geometry, *query.shape[-2:])
            part, *new = recomputed(_patch_row, padded, row, place, *arguments)
        out = out + part
        batch.append(new)
    if source == 'batch' and mean is not None:
        update_statistics(norm, *(_join(parts, kernel_size) for parts in zip(*batch, strict=True)))
    return out


def _by_kernel(
    query: Tensor,
    padded: Tensor,
    weight: Tensor,
    norm: nn.Module,
    statistics: tuple,
    geometry: tuple[int, int, int],
) -> Tensor:
    """The same; in inference by the native kernel, which has one dtype and no gradients."""
    source = statistics[0]
    same = query.dtype == padded.dtype == weight.dtype in (torch.float32, torch.float64)
    lower = torch.is_autocast_enabled('cpu')
    if source != 'fixed' or torch.is_grad_enabled() or not same or lower:
        return _by_rows(query, padded, weight, norm, statistics, geometry)
    scale, shift = batch_norm_affine(norm)
    weight, channels = weight.flatten(1), query.size(1)
    own = [t[:channels].view(-1, 1, 1) for t in (scale, shift)]
    out = F.conv2d((query * own[0] + own[1]).relu_(), weight[:, :channels, None, None])
    rest = (scale[channels:], shift[channels:], weight.T[channels:])
    return out + native_backend.patch_weights(padded, *rest, *geometry)


OPERATORS['patch_weights'] = {
    'torch': Implementation(_by_rows),
    'native': Implementation(_by_kernel, native_backend.refuses),
}


def _patch_row(
    padded: Tensor, row: int, geometry: tuple[int, ...], *arguments
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return normalised_conv(_row(padded, row, geometry), *arguments)


def _row_statistics(padded: Tensor, row: int, geometry: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return local_statistics(_row(padded, row, geometry))


def _row(padded: Tensor, row: int, geometry: tuple[int, ...]) -> Tensor:
    """A row of every query's neighbourhood, (B, R * k, Hq, Wq)."""
    kernel_size, stride, dilation, height, width = geometry
    top = row * dilation
    strip = padded[..., top : top + (height - 1) * stride + 1 : stride, :]
    patch = [
        strip[..., left : left + (width - 1) * stride + 1 : stride]
        for left in range(0, kernel_size * dilation, dilation)
    ]
    return torch.stack(patch, 2).flatten(1, 2)
