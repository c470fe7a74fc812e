"""What the autograd formulas of the operators share."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Is forward-mode differentiation or a transform of torch.func on?

    The custom operators have formulas for the backward pass only, and would drop tangents in
    silence; what is asked then is plain PyTorch.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def takes_own_formulas(tensor: Tensor) -> bool:
    """May autograd functions of ours, made for training on CPUs, compute with ``tensor``?"""
    trains = tensor.device.type == 'cpu' and torch.is_grad_enabled() and tensor.numel() > 0
    return trains and not torch.compiler.is_compiling() and not transformed()


def refuse_second_order(backward: str, operator: str, backend: str) -> None:
    """Make the gradients that a custom operator computes raise where they are differentiated.

    Without a formula of its own, such an operator would pass for one without gradients, and what
    is built on second derivatives would be silently wrong.

    Args:
        backward (str): Of that custom operator, ``'namespace::name'``.
        operator (str): Name for the message.
        backend (str): Likewise.
    """

    def refuse(ctx, *gradients):
        raise NotImplementedError(f'{operator} has no second-order gradients (backend {backend!r})')

    torch.library.register_autograd(backward, refuse)


def spread(gradients: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """One gradient for each input: those computed, in order, where needed, else None."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needed]
