"""Batch norm, ReLU and convolution, of which training keeps the input only."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ._batch_norm import (
    is_batch_norm,
    local_statistics,
    normalise,
    prepare_statistics,
    recomputed,
    update_statistics,
)
from ._checks import check_dtypes, check_shape, check_tensors
from ._dispatch import autocasts


def norm_relu_conv(
    x: Tensor,
    norm: nn.Module,
    weight: Tensor,
    bias: Tensor | None = None,
    then: Callable[..., Tensor] | None = None,
    *args,
) -> Tensor:
    """``F.conv2d(F.relu(norm(x)), weight, bias)``; the backward pass computes norm and ReLU anew.

    What the chain is made of otherwise stays in memory from forward to backward pass: the ReLU's
    output, as large as the input, and the convolution's, if what follows needs it.

    Args:
        x (Tensor): Shape (B, I, H, W).
        norm (nn.Module): ``nn.BatchNorm2d`` or ``nn.SyncBatchNorm`` of I channels, or a subclass
            that keeps their forward; in training mode its running statistics are brought up to
            date once, as its own forward would. Synchronised statistics work on the CPU, too. Any
            other module is called, and its output kept.
        weight (Tensor): Shape (O, I, 1, 1).
        bias (Tensor | None): Shape (O,). Default: None.
        then (Callable[..., Tensor] | None): What follows, computed anew as well. Called with the
            convolution's output and ``args``. Default: None.
        *args: See ``then``; tensors among them get gradients.

    Returns:
        Tensor: Shape (B, O, H, W), or what ``then`` returns.

    Raises:
        TypeError: If x, weight or bias is not a floating-point tensor.
        ValueError: If an argument is not as described; the message names it. Also for a batch with
            one value a channel, from whose statistics ``norm`` is to take its own, as
            nn.BatchNorm2d has it.
    """
    _check_tensors(x, norm, weight, bias)
    if not is_batch_norm(norm):
        out = F.conv2d(F.relu(norm(x)), weight, bias)
        return out if then is None else then(out, *args)

    norm._check_input_dim(x)
    statistics = prepare_statistics(norm, x[:, 0].numel(), lambda: recomputed(local_statistics, x))
    normalisation = (norm.weight, norm.bias, norm.eps, *statistics)
    parts = len(normalisation)

    def chain(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> tuple[Tensor | None, ...]:
        out, *batch = normalised_conv(x, weight, bias, *rest[:parts])
        return out if then is None else then(out, *rest[parts:]), *batch

    out, *batch = recomputed(chain, x, weight, bias, *normalisation, *args)
    update_statistics(norm, *batch)
    return out


def _check_tensors(x: Tensor, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(x=x, weight=weight)
    channels = getattr(norm, 'num_features', None) if is_batch_norm(norm) else None
    if x.dim() != 4 or min(x.shape[1:]) < 1 or channels not in (None, x.size(1)):
        raise ValueError(
            f'x must have shape (B, {channels or "I"}, H, W) with I, H, W >= 1, got '
            f'{tuple(x.shape)}'
        )
    if weight.dim() != 4 or weight.size(0) < 1 or weight.shape[1:] != (x.size(1), 1, 1):
        raise ValueError(
            f'weight must have shape (O, {x.size(1)}, 1, 1) for x of shape {tuple(x.shape)}, got '
            f'{tuple(weight.shape)}'
        )
    if bias is not None:
        check_tensors(x=x, bias=bias)
        check_shape('bias', bias, (weight.size(0),), f'weight of shape {tuple(weight.shape)}')
    if not autocasts(x):
        check_dtypes(x=x, weight=weight, bias=bias)


def normalised_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, *normalisation
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """:func:`normalise` of ``x`` with the arguments ``normalisation``, ReLU and convolution."""
    out, *batch = normalise(x, *normalisation)
    return F.conv2d(out.relu_(), weight, bias), *batch
