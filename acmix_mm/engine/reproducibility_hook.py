"""Random numbers that depend on seed and position in training alone."""

# ruff: noqa: NPY002, the generator that transforms use is the legacy one

import contextlib
import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, IterableDataset

EPOCH, ITERATION, BATCH = range(3)  # what a seed is for


class ReproducibilityHook(Hook):
    """Let a resumed run be equal to one that nothing has interrupted, bit for bit on a CPU.

    The generators of Python, numpy and torch are seeded at the start of every iteration, by the
    run's seed and the number of the iteration, and around the loading of every batch, by seed,
    process, epoch and the number of the batch. So nothing has to be kept that a checkpoint might
    lack, nor does it matter how many workers load the data, or whether validation, logging or the
    start of workers draws random numbers. The seed is the Runner's: of ``randomness``, or random,
    and on resumption that of the checkpoint.

    The checkpoint says how far the epoch has come, and the resumed run takes the batches from
    there on, without loading those before.

    Not covered are transforms that keep something from one picture to the next, as mmdet's
    ``CachedMosaic``, generators of a class's own, and data sets without indices.
    """

    priority = 'VERY_HIGH'

    def __init__(self):
        self.loaded: dict | None = None
        self.batches: SeededBatchSampler | None = None
        self.start = 0  # batches of the epoch that come from the checkpoint
        self.first_iter = self.epoch = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.loaded = checkpoint.get('sampler')

    def before_train(self, runner: Runner) -> None:
        loop = runner.train_loop
        loader: DataLoader = loop.dataloader
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            runner.logger.warning('data without indices of batches: a resumed run has other data')
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        resumed = self.loaded if runner.iter else None
        sampler = getattr(loader.batch_sampler, 'sampler', None)
        if resumed and hasattr(sampler, 'seed'):
            sampler.seed = resumed['seed']
        if type(sampler) is InfiniteSampler:
            # mmengine 0.10.7 has begun to take from it.
            sampler.__init__(sampler.dataset, sampler.shuffle, sampler.seed)
        self.batches = SeededBatchSampler(
            loader.batch_sampler, (runner.seed, BATCH, get_rank()), endless
        )
        vars(loader)['batch_sampler'] = self.batches  # which its __setattr__ would refuse
        load = getattr(loader.dataset, '__getitems__', None)
        load = load or functools.partial(_load_each, loader.dataset)
        loader.dataset.__getitems__ = functools.partial(load_seeded, load)
        loader._iterator = None  # if workers have been started, they do not know these
        if endless:
            self.start = runner.iter
            loop.dataloader_iterator = _BatchIterator(loop)
        elif resumed and resumed['batches']:
            if resumed['batches_per_epoch'] == len(loader):
                self.start = resumed['batches']
            else:
                runner.logger.warning(
                    f'the checkpoint was saved after {resumed["batches"]} of '
                    f'{resumed["batches_per_epoch"]} batches of an epoch, which has {len(loader)} '
                    'now: the epoch begins again'
                )

    def before_train_epoch(self, runner: Runner) -> None:
        seed_generators(runner.seed, EPOCH, runner.iter)
        if self.batches is None:
            return
        loop, start = runner.train_loop, self.start
        self.epoch, self.first_iter = runner.epoch, runner.iter - start
        self.batches.epoch, self.batches.start, self.start = runner.epoch, start, 0
        if start and not self.batches.endless:
            # mmengine would count the batches of this epoch from 0.
            run = loop.run_iter
            loop.run_iter = lambda index, batch: run(start + index, batch)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        seed_generators(runner.seed, ITERATION, runner.iter)

    def after_train_epoch(self, runner: Runner) -> None:
        vars(runner.train_loop).pop('run_iter', None)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self.batches is not None:
            meta = checkpoint['meta']
            checkpoint['sampler'] = {
                'seed': getattr(self.batches.sampler, 'seed', None),
                'batches': meta['iter'] - self.first_iter if meta['epoch'] == self.epoch else 0,
                'batches_per_epoch': len(self.batches),
            }


def seed_generators(*numbers: int) -> None:
    """Seed the generators of Python, numpy and torch by numbers of which each counts."""
    seed = _mix(numbers)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _mix(numbers: Sequence[int]) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class SeededBatch(list):
    """Indices of a batch, with the numbers that seed what is random in loading it."""

    def __init__(self, indices: Sequence[int], seed: tuple[int, ...]):
        super().__init__(indices)
        self.seed = seed


class SeededBatchSampler:
    """The batches of another sampler, with seeds, from any of them on.

    Args:
        batch_sampler: What yields lists of indices.
        seed (tuple[int, ...]): What is common to all seeds.
        endless (bool): Whether to begin anew at the end.
    """

    def __init__(self, batch_sampler, seed: tuple[int, ...], endless: bool):
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.endless = endless
        self.epoch = 0
        self.start = 0

    def __getattr__(self, name: str):
        if name == 'batch_sampler':  # before __init__
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[SeededBatch]:
        for number, batch in enumerate(self._all()):
            if number >= self.start:
                yield SeededBatch(batch, (*self.seed, self.epoch, number))

    def _all(self) -> Iterator[list[int]]:
        for rounds in itertools.count():
            if rounds and hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(rounds)
            empty = True
            for batch in self.batch_sampler:
                empty = False
                yield batch
            if empty:
                raise ValueError(
                    f'train_dataloader gives no batch: {len(self.sampler)} pictures, batch_size '
                    f'{self.batch_size}, drop_last {self.drop_last}'
                )
            if not self.endless:
                return


class _BatchIterator:
    """In the place of mmengine's infinite iterator, as the sampler is endless and has skipped.

    mmengine 0.10.7 skips what has been trained by calls of ``next``, OneDL's by ``skip_iter``.
    """

    def __init__(self, loop: IterBasedTrainLoop):
        self.loader = loop.dataloader
        self.iterator = None
        self.to_skip = 0 if hasattr(loop.dataloader_iterator, 'skip_iter') else loop.iter

    def __iter__(self):
        return self

    def __next__(self):
        if self.to_skip:
            self.to_skip -= 1
            return None
        if self.iterator is None:
            self.iterator = iter(self.loader)
        return next(self.iterator)

    def skip_iter(self, count: int) -> None:
        pass


def load_seeded(load: Callable[[list[int]], list], batch: list[int]) -> list:
    """Load a batch with generators of its own, in a worker or in the process that trains."""
    if not isinstance(batch, SeededBatch):
        return load(batch)
    with _generators_of_its_own(_mix(batch.seed)):
        return load(batch)


@contextlib.contextmanager
def _generators_of_its_own(seed: int) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # not of GPUs, which workers cannot have
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _load_each(dataset, indices: list[int]) -> list:
    return [dataset[index] for index in indices]
