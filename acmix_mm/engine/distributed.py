"""Several processes: models without a GPU, and validation of what is saved."""

import functools

from mmengine.dist import broadcast
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS, MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import nn

from ..ops._batch_norm import batch_norm


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper for processes that train on CPUs, models with synchronised norms included.

    PyTorch computes ``nn.SyncBatchNorm`` on GPUs alone, and refuses to wrap a model on a CPU that
    has any. Here they join the statistics by :func:`acmix_mm.ops._batch_norm.batch_norm`.

    Args:
        module (nn.Module): The model, on the CPU.
        device_ids (list[int] | None): Not used; mmengine's Runner gives those of GPUs.
        broadcast_buffers (bool): Whether the first process's buffers go to all before each
            iteration. Default: False, as mmengine's Runner has it.
        **kwargs: Of ``MMDistributedDataParallel``.
    """

    def __init__(
        self,
        module: nn.Module,
        device_ids: list[int] | None = None,
        broadcast_buffers: bool = False,
        **kwargs,
    ):
        for layer in module.modules():
            if type(layer).forward is nn.SyncBatchNorm.forward:
                layer.forward = functools.partial(batch_norm, norm=layer)
        super().__init__(module, device_ids=None, broadcast_buffers=broadcast_buffers, **kwargs)

    def _passing_sync_batchnorm_handle(self, module: nn.Module) -> None:
        """Where PyTorch refuses the norms."""


@HOOKS.register_module()
class SharedBuffersHook(Hook):
    """Validate the model that checkpoints hold, with the first process's buffers in all processes.

    Batch norms that are not synchronised have running statistics by process. Otherwise each process
    validates its share of the data with its own, and the metrics are those of no model.
    """

    priority = 'LOWEST'  # after those that put an averaged model in place

    def before_val_epoch(self, runner: Runner) -> None:
        for buffer in runner.model.buffers():
            broadcast(buffer)
