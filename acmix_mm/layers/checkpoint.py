"""Checkpointing of modules with batch norms."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_module(module: nn.Module, function: Callable, *args):
    """``function(*args)``, a computation of ``module``, done anew in the backward pass.

    Running statistics of batch norms are brought up to date in the forward pass only, as without
    checkpointing; torch.utils.checkpoint alone would count every batch twice.

    Args:
        module (nn.Module): Whose batch norms ``function`` calls.
        function (Callable): What to compute.
        *args: Of ``function``.

    Returns:
        What ``function`` returns.
    """
    if torch.compiler.is_compiling():  # buffers are written once there, and contexts not traced
        return checkpoint(function, *args, use_reentrant=False)
    contexts = (nullcontext(), _KeptStatistics(module))
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: contexts)


class _KeptStatistics:
    """Context in which batch norms write to copies of their running statistics.

    A class, as a backward pass with ``retain_graph`` enters it again.
    """

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self) -> None:
        norms = (m for m in self.module.modules() if isinstance(m, _BatchNorm) and m.training)
        # Copies, not None: what is computed anew has to save as many tensors as before.
        self.buffers = [(norm, dict(norm.named_buffers(recurse=False))) for norm in norms]
        for norm, buffers in self.buffers:
            norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})

    def __exit__(self, *error) -> None:
        for norm, buffers in self.buffers:
            norm._buffers.update(buffers)
