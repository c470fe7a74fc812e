"""Training that a scheduler interrupts."""

import atexit
import functools
import multiprocessing
import signal
import sys
from collections.abc import Callable

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from .checkpoint_hook import SafeCheckpointHook

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EX_TEMPFAIL = 75  # of sysexits.h: the same again later


class PreemptionHook(Hook):
    """At SIGTERM or SIGUSR1, finish the iteration, save a checkpoint, and exit with code 75.

    SIGTERM is what schedulers send before they take a machine away, and SIGUSR1 what Slurm's
    ``--signal=USR1@120`` sends 120 seconds before the end. Code 75, EX_TEMPFAIL, asks for the same
    command again, with ``resume=True``. A validation in which the signal comes is repeated then.

    Works with :class:`SafeCheckpointHook`, which saves; without it nothing is saved. Where
    gradients are accumulated, the iteration is the one that updates the weights.
    """

    priority = 'LOWEST'

    def __init__(self):
        self.signal = None
        self.previous = {}
        self.validate = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.validate = checkpoint.get('meta', {}).get('validate', False)

    def before_train(self, runner: Runner) -> None:
        self.signal = None
        self.previous = {name: signal.signal(name, self._receive) for name in SIGNALS}
        for loader in self._loaders(runner):
            loader.worker_init_fn = functools.partial(start_worker, loader.worker_init_fn)
        atexit.register(end_workers)
        if runner.iter and self.validate and runner.val_loop is not None:
            runner.val_loop.run()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None):
        received = torch.tensor(float(self.signal is not None))
        all_reduce(received, 'max')
        optim = runner.optim_wrapper
        wrappers = optim.values() if isinstance(optim, OptimWrapperDict) else [optim]
        if received and all(wrapper.should_update() for wrapper in wrappers):
            self._leave(runner, runner.epoch, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None):
        # No other process is waited for: their validation may have less to do.
        if self.signal is not None:
            self._leave(runner, runner.epoch, runner.iter, validate=True)

    def after_train(self, runner: Runner) -> None:
        for name, handler in self.previous.items():
            signal.signal(name, handler)
        self.previous = {}
        # Workers end with their iterators; left to the end of the process, each takes seconds.
        for loader in self._loaders(runner):
            loader._iterator = None
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            runner.train_loop.dataloader_iterator = None

    def _loaders(self, runner: Runner) -> list[DataLoader]:
        return [loop.dataloader for loop in (runner.train_loop, runner.val_loop) if loop]

    def _receive(self, number: int, frame) -> None:
        self.signal = signal.Signals(number).name

    def _leave(self, runner: Runner, epoch: int, iteration: int, **state) -> None:
        for hook in runner.hooks:
            if isinstance(hook, SafeCheckpointHook):
                hook.save_interrupted(runner, epoch, iteration, **state)
                runner.logger.info(f'interrupted; {hook.last_ckpt} is where to go on')
        self.after_train(runner)
        sys.exit(EX_TEMPFAIL)


def start_worker(initialise: Callable[[int], None] | None, worker: int) -> None:
    """Have a worker of a loader outlive a signal that its whole process group gets."""
    for name in SIGNALS:
        signal.signal(name, _ignore_once)
    if initialise is not None:
        initialise(worker)


def end_workers() -> None:
    """End the workers that a training which failed has left.

    Python sends them SIGTERM once when the process exits, which they outlive, and waits for them.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes it for another failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _ignore_once(number: int, frame) -> None:
    # Not for ever: the loader ends workers that hang by SIGTERM.
    signal.signal(number, signal.SIG_DFL)
