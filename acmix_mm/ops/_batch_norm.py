"""What nn.BatchNorm2d and nn.SyncBatchNorm do, in parts, for operators that take a norm in."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.checkpoint import checkpoint

from ._autograd import transformed


def batch_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)``, also for nn.SyncBatchNorm on the CPU, which its own forward refuses.

    Args:
        x (Tensor): Shape (B, C, ...).
        norm (nn.Module): Any module.

    Returns:
        Tensor: What ``norm`` returns.
    """
    if type(norm).forward is not nn.SyncBatchNorm.forward or x.device.type != 'cpu':
        return norm(x)
    norm._check_input_dim(x)
    statistics = prepare_statistics(norm, x[:, 0].numel(), lambda: recomputed(local_statistics, x))
    out, *batch = recomputed(normalise, x, norm.weight, norm.bias, norm.eps, *statistics)
    update_statistics(norm, *batch)
    return out


def conv_batch_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``; one convolution, with gradients, where the norm takes fixed statistics.

    Args:
        x (Tensor): Shape (B, I, H, W).
        conv (nn.Conv2d): The convolution.
        norm (nn.Module): Any module.

    Returns:
        Tensor: What ``norm`` returns.
    """
    if not is_batch_norm(norm) or norm.training or norm.running_var is None:
        return batch_norm(conv(x), norm)
    factor, shift = batch_norm_affine(norm)
    bias = shift if conv.bias is None else shift + conv.bias * factor
    return conv._conv_forward(x, conv.weight * factor.view(-1, 1, 1, 1), bias)


def is_batch_norm(norm: nn.Module | type[nn.Module]) -> bool:
    """Whether a module, or a class, computes what nn.BatchNorm2d or nn.SyncBatchNorm does.

    That is a matter of the forward, which subclasses keep (as mmengine's do) or replace.
    """
    kind = norm if isinstance(norm, type) else type(norm)
    known = kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return known and not issubclass(kind, LazyModuleMixin)


def prepare_statistics(
    norm: nn.Module, count: int, local: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[str, Tensor | None, Tensor | None]:
    """What a batch norm normalises with, for :func:`normalise`.

    Args:
        norm (nn.Module): The batch norm, see :func:`is_batch_norm`.
        count (int): Values of a channel, 0 or more.
        local (Callable[[], tuple[Tensor, Tensor]]): Gives the :func:`local_statistics`; called only
            if they are to be joined with other processes'.

    Returns:
        tuple[str, Tensor | None, Tensor | None]: Source, mean and biased variance, (C,) each:

        * 'fixed': the running statistics.
        * 'processes': statistics of all processes' batches, with gradients, which go to all of
          them; running statistics are up to date with them.
        * 'batch': those of the batch, to be found while normalising. Until then the tensors are
          what they are if it is empty, or None if running statistics are not wanted.
    """
    group = _process_group(norm)
    if group is not None:
        mean, variance, unbiased = _join(*local(), count, group)
        if norm.track_running_stats:
            update_statistics(norm, mean, unbiased)
        return 'processes', mean, variance
    if not norm.training and not (norm.running_mean is None and norm.running_var is None):
        return 'fixed', norm.running_mean, norm.running_var
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return 'batch', None, None
    # Copies: checkpointing refuses tensors that change before the backward pass.
    return 'batch', norm.running_mean.clone(), norm.running_var.clone()


def normalise(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    source: str,
    mean: Tensor | None,
    variance: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Batch norm of ``x`` by what :func:`prepare_statistics` returns.

    Args:
        x (Tensor): Shape (B, C, ...).
        scale (Tensor | None): Shape (C,).
        shift (Tensor | None): Shape (C,).
        eps (float): Added to the variance.
        source (str): See :func:`prepare_statistics`; so are the others.
        mean (Tensor | None): Shape (C,).
        variance (Tensor | None): Shape (C,).

    Returns:
        tuple[Tensor, Tensor | None, Tensor | None]: The result, in shape and dtype of ``x``; for
        'batch', mean and unbiased variance of the batch if they are wanted, None otherwise.

    Raises:
        ValueError: For 'batch' and one value a channel, as nn.BatchNorm2d has it.
    """
    if source == 'fixed':
        return F.batch_norm(x, mean, variance, scale, shift, False, 0.0, eps), None, None
    if source == 'batch':
        if mean is not None:
            mean, variance = mean.clone(), variance.clone()  # at momentum 1, they are overwritten
        return F.batch_norm(x, mean, variance, scale, shift, True, 1.0, eps), mean, variance
    factor = (variance + eps).rsqrt()
    factor = factor if scale is None else factor * scale
    shape = (-1, *(1,) * (x.dim() - 2))
    # Centred first: the factor's gradient would be a difference of large sums otherwise.
    out = (x - mean.view(shape)) * factor.view(shape)
    if shift is not None:
        out += shift.view(shape)
    return out.to(x.dtype), None, None


@torch.no_grad()
def update_statistics(norm: nn.Module, mean: Tensor | None, variance: Tensor | None) -> None:
    """Bring running statistics up to date, as nn.BatchNorm2d's forward does in training mode.

    Args:
        norm (nn.Module): The batch norm.
        mean (Tensor | None): Of the batch, shape (C,). None leaves everything as it is.
        variance (Tensor | None): Of the batch, unbiased, shape (C,).
    """
    if mean is None or norm.running_mean is None:
        return
    factor = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if factor is None:  # cumulative average
            factor = norm.num_batches_tracked.reciprocal().to(norm.running_mean.dtype)
    if factor is not None:
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
        norm.running_var.lerp_(variance.to(norm.running_var.dtype), factor)


def batch_norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and shift, (C,) each, that a batch norm multiplies and adds in evaluation mode.

    Args:
        norm (nn.Module): The batch norm, of C channels.

    Raises:
        ValueError: If norm is no batch norm with running statistics.
    """
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        raise ValueError(
            f'norm must be a batch norm with running statistics, got {type(norm).__name__}'
        )
    factor = (norm.running_var + norm.eps).rsqrt()
    factor = factor if norm.weight is None else factor * norm.weight
    shift = -norm.running_mean * factor
    return factor, shift if norm.bias is None else shift + norm.bias


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (C,), in float32 or more; 0 of an empty map."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = (0, *range(2, x.dim()))
    if x.numel():
        variance, mean = torch.var_mean(x, dims, correction=0)
        return mean, variance
    # With gradients, as elsewhere: all processes take part when those are summed.
    return x.sum(dims), x.sum(dims)


def recomputed(function: Callable, *args):
    """``function(*args)``, of which training keeps ``args`` only.

    More under transforms of torch.func, which do not know checkpoints.
    """
    if torch.is_grad_enabled() and not transformed():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def _process_group(norm: nn.Module) -> 'distributed.ProcessGroup | None':
    """Where ``norm`` joins the statistics of batches; None if it takes this process's alone."""
    if type(norm).forward is not nn.SyncBatchNorm.forward or not norm.training:
        return None
    if not distributed.is_available() or not distributed.is_initialized():
        return None
    group = norm.process_group or distributed.group.WORLD
    return group if distributed.get_world_size(group) > 1 else None


def _join(
    mean: Tensor, variance: Tensor, count: int, group: 'distributed.ProcessGroup'
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased and unbiased variance of all processes' batches, (C,), from those of each."""
    sums = _AllReduce.apply(torch.cat([mean * count, mean.new_full((1,), count)]), group)
    total = sums[-1].detach().clamp(min=1)
    joint = sums[:-1] / total
    variance = _AllReduce.apply((variance + (mean - joint).square()) * count, group) / total
    return joint, variance, variance * (total / (total - 1).clamp(min=1))


class _AllReduce(torch.autograd.Function):
    """Sum over processes. The loss of each depends on it, so gradients are summed likewise."""

    @staticmethod
    def forward(ctx, x: Tensor, group: 'distributed.ProcessGroup') -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None
