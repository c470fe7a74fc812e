"""What the autograd formulas of the operators share."""

from collections.abc import Callable, Sequence
from functools import partial

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


def register_bilinear(
    names: tuple[str, str, str],
    num_options: int,
    function: Callable[..., Tensor],
    grad_first: Callable[..., Tensor],
    grad_second: Callable[..., Tensor],
) -> None:
    """Derivatives of a function that is linear in each of two tensors, and of its two gradients.

    They are linear in each of their tensors likewise, so that all derivatives, of any order, are
    made of these three.

    Args:
        names (tuple[str, str, str]): Of the operators: the function and its gradients with respect
            to its first and to its second tensor.
        num_options (int): How many arguments, the last, all three have in common.
        function (Callable[..., Tensor]): (first, second, options) -> result.
        grad_first (Callable[..., Tensor]): (gradient of the result, second, first, options) ->
            gradient of the first, of which the shape is looked at only.
        grad_second (Callable[..., Tensor]): (gradient of the result, first, second, options) ->
            gradient of the second, likewise.
    """
    # By operator: the gradient g of the result, taken to its first tensor a and to its second, b.
    formulas = (
        (lambda g, a, b, o: grad_first(g, b, a, o), grad_second),
        (lambda g, a, b, o: function(g, b, o), lambda g, a, b, o: grad_second(a, g, b, o)),
        (lambda g, a, b, o: function(b, g, o), lambda g, a, b, o: grad_first(a, g, b, o)),
    )

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.inputs, ctx.options = len(inputs), inputs[-num_options:]

    def differentiate(to_first, to_second, ctx, grad):
        arguments = (grad, *ctx.saved_tensors, ctx.options)
        of_first, of_second, of_bias, *_ = ctx.needs_input_grad
        return (
            to_first(*arguments) if of_first else None,
            to_second(*arguments) if of_second else None,
            grad.sum((0, 2, 3)) if of_bias else None,  # the third is a tensor in a convolution
            *(None,) * (ctx.inputs - 3),
        )

    for name, formula in zip(names, formulas, strict=True):
        torch.library.register_autograd(
            f'acmix_mm::{name}', partial(differentiate, *formula), setup_context=setup_context
        )
