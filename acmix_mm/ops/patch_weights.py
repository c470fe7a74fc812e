"""Attention weights from the concatenation of a query and the patch of keys around it (SAN)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ._batch_norm import (
    is_batch_norm,
    local_statistics,
    prepare_statistics,
    recomputed,
    update_statistics,
)
from ._checks import check_dtypes, check_geometry, check_shape, check_tensors, strided_size
from ._dispatch import OPERATORS, Implementation, autocast_tensors, autocasts, dispatch
from ._reflection import reflect_pad
from .backends import native_backend, triton_backend
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

    By 'native' and 'triton', there are no second-order gradients.

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
        backend (str | None): As of :func:`acmix_mm.ops.local_attention`; 'native' and 'triton'
            have kernels of their own here, 'triton' with gradients for at most 64 outputs; all
            else is PyTorch. Default: None.

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

    padded = reflect_pad(key, kernel_size // 2 * dilation).to(key.dtype)
    geometry = (kernel_size, stride, dilation)

    def local() -> tuple[Tensor, Tensor]:
        return recomputed(_patch_statistics, query, padded, *geometry)

    statistics = prepare_statistics(norm, query[:, 0].numel(), local)
    return dispatch('patch_weights', backend, query, padded, weight, norm, statistics, geometry)


def _patch_statistics(
    query: Tensor, padded: Tensor, kernel_size: int, stride: int, dilation: int
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (R (1 + k k),), of the query's channels and of the patch's.

    Each copy of a key's channel is a window of it, and sums over all windows are two products of
    the map with matrices of zeros and ones. In float64: a variance is the difference of two sums.
    """
    mean, variance = local_statistics(query.double())

    def windows(length: int, count: int) -> Tensor:
        """(length, k): 1 where a position belongs to a window."""
        offsets = torch.arange(kernel_size, device=padded.device) * dilation
        positions = torch.arange(length, device=padded.device)[:, None] - offsets
        inside = (positions >= 0) & (positions <= (count - 1) * stride)
        return (inside & (positions % stride == 0)).double()

    rows, columns = map(windows, padded.shape[-2:], query.shape[-2:])
    key = padded.double()
    centre = key.detach().sum((0, 2, 3), keepdim=True) / max(1, key[:, 0].numel())
    centred = key - centre
    first, second = (
        (rows.T @ (maps @ columns)).sum(0) / max(1, query[:, 0].numel())
        for maps in (centred, centred.square())
    )
    means = (mean, (first + centre[0]).flatten())
    variances = (variance, (second - first.square()).flatten())
    dtype = torch.promote_types(query.dtype, torch.float32)
    return torch.cat(means).to(dtype), torch.cat(variances).to(dtype)


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
    kernel: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The same by a kernel with the arguments of the native one, which is the default."""
    source, mean, variance = statistics
    count = query[:, 0].numel()
    if source == 'batch' and count < 2:  # which is refused, or empty
        return _by_rows(query, padded, weight, norm, statistics, geometry)
    if source == 'batch':
        tracked = mean is not None
        mean, variance = recomputed(_patch_statistics, query, padded, *geometry)
        if tracked:
            update_statistics(norm, mean, variance * (count / (count - 1)))
    # Under autocast, one of them may be in half precision.
    dtype = torch.promote_types(query.dtype, padded.dtype)
    query, padded = query.to(dtype), padded.to(dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    factor = (variance.to(dtype) + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = torch.zeros_like(mean) if norm.bias is None else norm.bias
    parameters = (t.to(dtype) for t in (mean, factor, shift, weight.flatten(1).T))
    kernel = native_backend.patch_weights if kernel is None else kernel
    out = kernel(query, padded, *parameters, *geometry)
    return autocast_tensors(out)[0]


OPERATORS['patch_weights'] = {
    'torch': Implementation(_by_rows),
    'native': Implementation(_by_kernel, native_backend.refuses),
}
if triton_backend.MISSING is None:
    from .backends import triton_patch_weights

    def _in_triton(query: Tensor, padded: Tensor, weight: Tensor, *rest) -> Tensor:
        if torch.is_grad_enabled() and weight.size(0) > triton_patch_weights.LARGEST_OUTPUTS:
            return _by_rows(query, padded, weight, *rest)
        return _by_kernel(query, padded, weight, *rest, triton_patch_weights.patch_weights)

    OPERATORS['patch_weights']['triton'] = Implementation(_in_triton, triton_backend.refuses_tensor)


def _patch_row(
    padded: Tensor, row: int, geometry: tuple[int, ...], *arguments
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return normalised_conv(_row(padded, row, geometry), *arguments)


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
