"""Mixed precision on a CPU, where mmengine's AmpOptimWrapper does not start."""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator

import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import nn
from torch.utils._pytree import tree_map_only


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
        _keep_float32()

    @contextlib.contextmanager
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


@functools.cache
def _keep_float32() -> None:
    """mmcv's kernels for CPUs refuse bfloat16, and autocast does not know them: cast for them."""
    functions = {'nms': ('NMSop', 'SoftNMSop'), 'roi_align': ('RoIAlignFunction',)}
    for module, names in functions.items():
        with contextlib.suppress(ImportError):  # mmcv-lite has none
            for name in names:
                function = getattr(importlib.import_module(f'mmcv.ops.{module}'), name)
                function.forward = staticmethod(_in_float32(function.forward))
                function.backward = staticmethod(_in_float32(function.backward))


def _in_float32(function: Callable) -> Callable:
    """The same of bfloat16 on the CPU, by way of float32."""

    def is_half(value) -> bool:
        is_tensor = isinstance(value, torch.Tensor)
        return is_tensor and value.dtype == torch.bfloat16 and value.device.type == 'cpu'

    @functools.wraps(function)
    def cast(ctx, *args):
        if not any(map(is_half, args)):
            return function(ctx, *args)
        out = function(ctx, *(a.float() if is_half(a) else a for a in args))
        return tree_map_only(
            torch.Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, out
        )

    return cast


def _check(dtype: str | torch.dtype | None) -> None:
    if dtype not in (None, 'bfloat16', torch.bfloat16):
        raise ValueError(f"optim_wrapper.dtype must be 'bfloat16' on a CPU, got {dtype!r}")
