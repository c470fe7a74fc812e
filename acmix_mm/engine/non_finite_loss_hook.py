"""Training stops where a loss is not finite."""

import math

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from .checkpoint_hook import last_checkpoint


class StopAtNonFiniteLossHook(Hook):
    """Stop at the first iteration whose loss is not finite, before another checkpoint is saved.

    With a gradient scaler, as of ``AmpOptimWrapper``, such an iteration changes no weights: the
    scaler skips the step. So it also does while it looks for a scale. Training then stops after
    ``patience`` such iterations in a row.

    Args:
        patience (int): Iterations in a row which a gradient scaler may skip. 30 of them take a
            dynamic scale from its start, 65536, to 6e-5. Default: 30.
    """

    priority = 'HIGH'

    def __init__(self, patience: int = 30):
        if patience < 1:
            raise ValueError(f'patience must be at least 1, got {patience}')
        self.patience = patience
        self.skipped = 0
        self.scale = 0.0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Look at the losses.

        Raises:
            FloatingPointError: If one is not finite; the message names iteration, losses, learning
                rate and the last checkpoint.
        """
        losses = {
            name: value.item() if torch.is_tensor(value) else value
            for name, value in (outputs or {}).items()
            if 'loss' in name and (isinstance(value, float) or torch.is_tensor(value))
        }
        finite = all(map(math.isfinite, losses.values()))
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        if scaler is not None and scaler.is_enabled():
            before, self.scale = self.scale, scaler.get_scale()
            self.skipped = self.skipped + 1 if not finite or self.scale < before else 0
            if self.skipped < self.patience:
                return
            problem = f'{self.skipped} iterations in a row had losses or gradients not finite'
        elif finite:
            return
        else:
            problem = 'a loss is not finite'
        terms = ', '.join(f'{name} {value:.4g}' for name, value in losses.items())
        rates = ', '.join(
            f'{name} {" ".join(sorted({f"{rate:.3g}" for rate in values}))}'
            for name, values in runner.optim_wrapper.get_lr().items()
        )
        raise FloatingPointError(
            f'training stopped at iteration {runner.iter + 1}: {problem} ({terms}); learning rate: '
            f'{rates}; {last_checkpoint(runner)}'
        )
