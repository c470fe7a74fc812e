"""Batch norm, ReLU and convolution, of which training keeps the input only."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
        norm (nn.Module): ``nn.BatchNorm2d`` of I channels; in training mode its running statistics
            are brought up to date once, as its own forward would. Any other module is called, and
            its output kept.
        weight (Tensor): Shape (O, I, 1, 1).
        bias (Tensor | None): Shape (O,). Default: None.
        then (Callable[..., Tensor] | None): What follows, computed anew as well. Called with the
            convolution's output and ``args``. Default: None.
        *args: See ``then``; tensors among them get gradients.

    Returns:
        Tensor: Shape (B, O, H, W), or what ``then`` returns.
    """
    if type(norm) is not nn.BatchNorm2d:
        out = F.conv2d(F.relu(norm(x)), weight, bias)
        return out if then is None else then(out, *args)

    def chain(x: Tensor, weight: Tensor, bias: Tensor | None, *args) -> tuple[Tensor, ...]:
        out, *statistics = normalised_conv(
            x, weight, bias, norm.weight, norm.bias, *fixed_statistics(norm), norm.eps
        )
        return out if then is None else then(out, *args), *statistics

    if torch.is_grad_enabled():
        out, *statistics = checkpoint(chain, x, weight, bias, *args, use_reentrant=False)
    else:
        out, *statistics = chain(x, weight, bias, *args)
    update_statistics(norm, *statistics, x[:, 0].numel())
    return out


def normalised_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm, ReLU, convolution; also mean and inverse deviation of ``x``.

    ``mean`` and ``variance`` are fixed statistics, or None for those of the batch. The two returned
    are without gradient, and empty if statistics are fixed.
    """
    x, mean, invstd = torch.native_batch_norm(
        x, scale, shift, mean, variance, mean is None, 0.0, eps
    )
    return F.conv2d(x.relu_(), weight, bias), mean.detach(), invstd.detach()


def fixed_statistics(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance that nn.BatchNorm2d would apply, None for those of the batch."""
    if norm.training or norm.running_mean is None:
        return None, None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm2d, mean: Tensor, invstd: Tensor, count: int) -> None:
    """Bring running statistics up to date in training mode, as nn.BatchNorm2d's forward does.

    Args:
        norm (nn.BatchNorm2d): The norm.
        mean (Tensor): Of the batch, shape (C,).
        invstd (Tensor): 1 / sqrt(variance + eps) of the batch, shape (C,).
        count (int): Values of a channel.
    """
    if not (norm.training and norm.track_running_stats):
        return
    norm.num_batches_tracked.add_(1)
    factor = norm.momentum
    if factor is None:  # cumulative average
        factor = 1 / norm.num_batches_tracked.item()
    variance = (invstd.pow(-2) - norm.eps) * (count / max(count - 1, 1))  # unbiased
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), factor)
