"""What the operators' autograd formulas share."""

import torch


def refuse_second_order(backward: str, operator: str, backend: str) -> None:
    """Have gradients of an operator's gradients refused, which would be zeros otherwise.

    Args:
        backward (str): Name of the custom operator that computes the gradients.
        operator (str): Name for the message.
        backend (str): Name for the message.
    """

    def refuse(ctx, *grads):
        raise NotImplementedError(f'{operator} has no second-order gradients (backend {backend!r})')

    torch.library.register_autograd(backward, refuse)
