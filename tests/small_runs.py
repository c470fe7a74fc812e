"""Trainings of a small model, by a real Runner, with randomness wherever it can be."""

# ruff: noqa: NPY002, as transforms use the legacy generator

import random
import uuid
from pathlib import Path

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from acmix_mm.checkpoints import make_checkpoints_loadable

HOOKS = ('ReproducibilityHook', 'StopAtNonFiniteLossHook', 'PreemptionHook')


class Noise(Dataset):
    """Numbers drawn by the three generators that transforms use."""

    def __init__(self, size: int = 10):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return {'inputs': torch.tensor([index, *drawn])}


class Line(BaseModel):
    """A linear layer behind batch norm and dropout, with noise from Python and numpy."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.line = torch.nn.Linear(4, 1)

    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        out = self.line(torch.nn.functional.dropout(self.norm(inputs), 0.3, self.training))
        if mode == 'loss':
            return {'loss': (out.squeeze(1) - random.random() - np.random.rand()).square().mean()}
        return [row.sum() for row in out]


MODELS.register_module(module=Line, force=True)


class Scores(BaseMetric):
    """Given metrics, one dict after each epoch."""

    def __init__(self, scores: list[dict[str, float]]):
        super().__init__()
        self.scores = scores

    def process(self, data_batch, data_samples) -> None:
        self.results += data_samples

    def compute_metrics(self, results) -> dict[str, float]:
        return self.scores[MessageHub.get_current_instance().get_info('epoch')]


def validation(scores: list[dict[str, float]]) -> dict:
    """Arguments of the Runner for an evaluation after each epoch."""
    loader = {'dataset': Noise(4), 'batch_size': 2, 'sampler': {'type': 'DefaultSampler'}}
    return {'val_cfg': {}, 'val_dataloader': loader, 'val_evaluator': [Scores(scores)]}


class Each(Hook):
    """Keep what each iteration was trained on, and act at one of them."""

    priority = 'VERY_LOW'

    def __init__(self, iteration: int | None = None, act=None):
        self.inputs, self.indices = [], []
        self.iteration, self.act = iteration, act

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.inputs.append(torch.stack(data_batch['inputs']))
        self.indices.append(batch_idx)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.act is not None and runner.iter + 1 == self.iteration:
            self.act()


class Kill(BaseException):
    """Ends a training at once."""


def kill() -> None:
    raise Kill


def make_runner(
    work_dir: Path,
    each: Each | None = None,
    by_epoch: bool = True,
    workers: int = 0,
    persistent: bool = False,
    size: int = 10,
    resume: bool = False,
    checkpoint: dict | None = None,
    seed: int | None = 0,
    model: BaseModel | None = None,
    sampler: dict | None = None,
    lr: float = 0.05,
    **settings,
) -> Runner:
    """Three epochs of five batches, or 15 iterations."""
    make_checkpoints_loadable()
    loop = {'by_epoch': True, 'max_epochs': 3} if by_epoch else {'by_epoch': False, 'max_iters': 15}
    kind = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    torch.manual_seed(5)  # for the weights
    return Runner(
        model=model or Line(),
        work_dir=str(work_dir),
        experiment_name=uuid.uuid4().hex,
        train_dataloader={
            'dataset': Noise(size),
            'batch_size': 2,
            'sampler': sampler or {'type': kind, 'shuffle': True},
            'num_workers': workers,
            'persistent_workers': persistent,
        },
        train_cfg=loop,
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': lr, 'momentum': 0.9}},
        default_hooks={
            'checkpoint': {
                'type': 'SafeCheckpointHook',
                'by_epoch': by_epoch,
                'interval': 1 if by_epoch else 5,
                **(checkpoint or {}),
            }
        },
        custom_hooks=[*({'type': name} for name in HOOKS), *filter(None, [each])],
        randomness={'seed': seed},
        resume=resume,
        log_level='WARNING',
        **settings,
    )


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    model = getattr(runner.model, 'module', runner.model)
    return {name: value.clone() for name, value in model.state_dict().items()}
