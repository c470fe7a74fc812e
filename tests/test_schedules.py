"""The length of training as one option: what the schedule is afterwards, and what is refused."""

import copy

import numpy as np
import pytest
import torch
import train
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, Runner
from refusals import refusal
from torch.utils.data import DataLoader

from acmix_mm.schedules import set_length

COCO = 'configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py'
ADE20K = 'configs/acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py'
DEMO = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'


def rates(cfg: Config, epoch_length: int) -> np.ndarray:
    """The learning rate at each iteration, by mmengine's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    by_epoch = 'max_epochs' in cfg.train_cfg

    class Loop(BaseLoop):
        max_epochs = cfg.train_cfg.get('max_epochs', 1)
        max_iters = cfg.train_cfg.get('max_iters', max_epochs * epoch_length)

        def run(self):
            pass

    runner = Runner.__new__(Runner)
    runner._train_loop = Loop(runner, DataLoader(range(epoch_length)))
    runner.optim_wrapper, runner.logger = OptimWrapper(optimizer), MMLogger.get_current_instance()
    schedulers = Runner.build_param_scheduler(runner, copy.deepcopy(cfg.param_scheduler))
    found = []
    for iteration in range(Loop.max_iters):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        end_of_epoch = by_epoch and (iteration + 1) % epoch_length == 0
        for scheduler in schedulers:
            if not scheduler.by_epoch or end_of_epoch:
                scheduler.step()
    return np.array(found)


@pytest.mark.parametrize(
    ('file', 'unit', 'whole', 'length', 'epoch_length'),
    [
        (COCO, 'epochs', 12, 6, 200),
        (COCO, 'epochs', 12, 36, 100),
        (DEMO, 'epochs', 4, 2, 500),
        (ADE20K, 'iters', 160_000, 1600, 1),
    ],
)
def test_the_rate_is_that_of_the_whole_at_the_same_share(file, unit, whole, length, epoch_length):
    """Read off mmengine's schedulers, at every share of the way."""
    cfg = Config.fromfile(file)
    if unit == 'iters':  # not 160,000 steps here
        set_length(cfg, 16_000, unit, file, 'x')
        whole = 16_000
    before = rates(cfg, epoch_length)
    set_length(cfg, length, unit, file, 'x')
    after = rates(cfg, epoch_length)
    ratio = length / whole
    assert len(after) == pytest.approx(len(before) * ratio)
    share = (np.arange(len(after)) + 0.5) / len(after)
    same = before[(share * len(before)).astype(int)]
    difference = np.abs(after - same)
    assert difference.max() < 0.1  # of rounded epochs and, where the warm-up is steep, iterations
    assert np.quantile(difference, 0.85) < 0.002


def test_intervals():
    cfg = Config.fromfile(ADE20K)
    set_length(cfg, 80_000, 'iters', ADE20K, 'x')
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 4000
    set_length(cfg, 8, 'iters', ADE20K, 'x')
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 1
    (poly,) = cfg.param_scheduler  # nothing is left of the warm-up
    assert (poly.type, poly.begin, poly.end) == ('PolyLR', 0, 8)
    cfg = Config.fromfile(COCO)
    set_length(cfg, 36, 'epochs', COCO, 'x')
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 3
    assert cfg.param_scheduler[0].end == 1500
    assert cfg.param_scheduler[1].milestones == [24, 33]
    set_length(cfg, 18, 'epochs', COCO, 'x')
    assert cfg.param_scheduler[1].milestones == [12, 16]  # 16.5: a third rate remains


def test_hooks_that_change_the_last_epochs():
    """As RTMDet's and YOLOX's; other intervals of hooks stay."""
    cfg = Config.fromfile(COCO)
    cfg.train_cfg.dynamic_intervals = [(10, 1)]
    cfg.custom_hooks = [
        {'type': 'PipelineSwitchHook', 'switch_epoch': 10},
        {'type': 'YOLOXModeSwitchHook', 'num_last_epochs': 2},
        {'type': 'PathBiasHook', 'interval': 50},
    ]
    set_length(cfg, 6, 'epochs', COCO, 'x')
    assert cfg.train_cfg.dynamic_intervals == [(5, 1)]
    switch, yolox, bias = cfg.custom_hooks
    assert (switch.switch_epoch, yolox.num_last_epochs, bias.interval) == (5, 1, 50)


def test_program():
    cfg = train.build_config(train.parse_args([COCO, '--max-epochs', '3']))
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 3
    assert cfg.param_scheduler[1].milestones == [2, 3]
    assert cfg.param_scheduler[0].end == 125


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([COCO, '--max-iters', '9'], '--max-iters: .* counts epochs (train_cfg.max_epochs)'),
        ([ADE20K, '--max-epochs', '9'], '--max-epochs: .* counts iterations (train_cfg.max_iters)'),
        ([COCO, '--max-epochs', '0'], "--max-epochs: '0' is not an integer above 0"),
        ([COCO, '--max-epochs', '1', '--max-iters', '1'], '--max-iters: not allowed with'),
    ],
)
def test_refused(argv, message, tmp_path):
    said = refusal(train.main, [*argv, '--work-dir', str(tmp_path / 'w')])
    for part in message.split('.*'):
        assert part in said
