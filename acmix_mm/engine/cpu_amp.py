"""Mixed precision on a CPU, where mmengine's AmpOptimWrapper does not start."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn


class CPUAmpOptimWrapper(OptimWrapper):
    """Optimiser whose forward passes run in bfloat16 on the CPU.

    There is no loss scale: bfloat16 has the exponents of float32. Weights, gradients and the
    optimiser's state are float32.

    Args:
        dtype (str | torch.dtype | None): 'bfloat16' is the only one. Default: None, for it.
        **kwargs: Of mmengine's ``OptimWrapper``.

    Raises:
        ValueError: If dtype is another.
    """

    def __init__(self, dtype: str | torch.dtype | None = None, **kwargs):
        _check(dtype)
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, around the forward pass and what else OptimWrapper has there."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield

    def load_state_dict(self, state_dict: dict) -> None:
        """That of a run on a GPU, too, whose loss scale is left out."""
        super().load_state_dict({k: v for k, v in state_dict.items() if k != 'loss_scaler'})


def use_bfloat16(cfg: Config) -> bool:
    """Put the wrapper for CPUs in the place of mmengine's ``AmpOptimWrapper``, in place.

    Returns:
        bool: Whether the config has mixed precision.

    Raises:
        ValueError: If the config asks for another dtype than bfloat16.
    """
    wrapper = cfg.optim_wrapper
    if wrapper.get('type') not in ('AmpOptimWrapper', 'mmengine.AmpOptimWrapper', AmpOptimWrapper):
        return False
    _check(wrapper.get('dtype'))
    wrapper.type = CPUAmpOptimWrapper.__name__
    for gpu_only in ('loss_scale', 'use_fsdp'):
        wrapper.pop(gpu_only, None)
    return True


def _check(dtype: str | torch.dtype | None) -> None:
    if dtype not in (None, 'bfloat16', torch.bfloat16):
        raise ValueError(f"optim_wrapper.dtype must be 'bfloat16' on a CPU, got {dtype!r}")
