"""Rates of mixed operators in the visualizer's backends, by real trainings."""

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from mmengine.dist import get_rank
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.visualization.vis_backend import BaseVisBackend
from processes import run_two_processes
from small_runs import Each, Kill, kill, make_runner

from acmix_mm import deploy
from acmix_mm.analysis.path_bias import read_rates
from acmix_mm.engine import PathBiasHook
from acmix_mm.layers import ACmix
from acmix_mm.layers.path_rates import path_rates


class Mixed(BaseModel):
    """Two operators whose rates training changes."""

    def __init__(self, *mixes: str):
        super().__init__()
        mixes = mixes or ('learned', 'complementary')
        self.layers = torch.nn.Sequential(*(ACmix(4, 4, mix=mix) for mix in mixes))

    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(inputs) if isinstance(inputs, (list, tuple)) else inputs
        out = self.layers(inputs[:, :, None, None].expand(-1, -1, 2, 3) / 10)
        return {'loss': (out - 1).square().mean()} if mode == 'loss' else [out]


class Rates(Each):
    """Keeps the rates after each iteration."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rates = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        model = getattr(runner.model, 'module', runner.model)
        self.rates[runner.iter + 1] = path_rates(model)
        super().after_train_iter(runner, batch_idx, data_batch, outputs)


def runner_of(folder: Path, each: Rates | None = None, interval: int = 4, **settings):
    """15 iterations, with the hook by its name in the registry."""
    torch.manual_seed(0)  # for the weights
    runner = make_runner(folder, each, **{'model': Mixed(), 'lr': 0.01, **settings})
    runner.register_hook(HOOKS.build({'type': 'PathBiasHook', 'interval': interval}))
    return runner


def records(folder: Path) -> list[dict]:
    """Lines of all logs of a work directory with rates, in the order of their times."""
    lines = []
    for file in sorted(folder.glob('*/vis_data/scalars.json')):
        lines += [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if any(key.startswith('path_bias') for key in line)]


def expected(rates, step: int) -> dict:
    """The record of these rates."""
    line = {'step': step}
    for entry in rates:
        line[f'path_bias_rate1/{entry.name}'] = abs(entry.rate1)
        line[f'path_bias_rate2/{entry.name}'] = abs(entry.rate2)
        line[f'path_bias_ratio/{entry.name}'] = abs(entry.rate1 / entry.rate2)
    return line


@pytest.mark.parametrize('by_epoch', [True, False])
def test_records(tmp_path, by_epoch):
    """Every fourth iteration, across epochs, and the last one."""
    each = Rates()
    runner_of(tmp_path, each, by_epoch=by_epoch).train()
    found = records(tmp_path)
    assert [line['step'] for line in found] == [4, 8, 12, 15]
    for line in found:
        assert line == pytest.approx(expected(each.rates[line['step']], line['step']))
    assert each.rates[15] != each.rates[4]  # they are learned
    assert each.rates[15][0].name == 'layers.0'


def test_no_second_record_at_the_end(tmp_path):
    runner_of(tmp_path, interval=5).train()
    assert [line['step'] for line in records(tmp_path)] == [5, 10, 15]


def test_last_values_are_read(tmp_path):
    each = Rates()
    runner_of(tmp_path, each).train()
    rates, _ = read_rates(tmp_path)
    assert [r.name for r in rates] == ['layers.0', 'layers.1']
    for found, last in zip(rates, each.rates[15], strict=True):
        assert (found.rate1, found.rate2) == (abs(last.rate1), abs(last.rate2))


def test_resumed(tmp_path):
    """Records of both parts are those of a run without interruption."""
    runner_of(tmp_path / 'whole').train()
    with pytest.raises(Kill):
        runner_of(tmp_path / 'parts', Rates(7, kill)).train()
    runner_of(tmp_path / 'parts', resume=True).train()
    found = {line['step']: line for line in records(tmp_path / 'parts')}
    assert found == {line['step']: line for line in records(tmp_path / 'whole')}
    rates, file = read_rates(tmp_path / 'parts')
    assert 'path_bias_rate1/layers.0' in file.read_text()
    assert rates[0].rate1 == found[15]['path_bias_rate1/layers.0']


def test_log_is_not_flooded(tmp_path, capfd):
    """Neither the console nor the log's file has a word of them; losses are still there."""
    runner = runner_of(tmp_path, interval=1)
    runner.logger.setLevel('INFO')
    for handler in runner.logger.handlers:
        handler.setLevel('INFO')
    capfd.readouterr()
    runner.train()
    (log,) = tmp_path.glob('*/*.log')
    for text in (''.join(capfd.readouterr()), log.read_text()):
        assert 'loss: ' in text
        assert 'path_bias_' not in text
    assert len(records(tmp_path)) == 15


def test_what_is_not_finite_is_left_out(tmp_path):
    """A warm start begins with rate2 = 0; JSON has no infinity."""
    model = Mixed('learned')
    torch.nn.init.zeros_(model.layers[0].rate2)
    runner_of(tmp_path, model=model, interval=1, lr=0.0).train()
    line = records(tmp_path)[0]
    assert line == {'path_bias_rate1/layers.0': 0.5, 'path_bias_rate2/layers.0': 0, 'step': 1}


def test_nothing_to_record(tmp_path):
    runner_of(tmp_path, model=Mixed('sum', 'attention', 'conv'), lr=0.0).train()
    assert not records(tmp_path)
    (log,) = tmp_path.glob('*/*.log')
    assert log.read_text().count('PathBiasHook records nothing: no mixed operator of the') == 1


def test_refused(tmp_path):
    for interval in (0, -1, 2.5, '4'):
        with pytest.raises(ValueError, match=r'interval must be a positive integer, got '):
            PathBiasHook(interval)
    model = Mixed()
    model.layers = torch.nn.Conv2d(4, 4, 1)
    with pytest.raises(ValueError, match=r'model must have operators that mix .* Mixed has none'):
        runner_of(tmp_path, model=model).train()
    model = deploy(Mixed().eval())
    model.layers.requires_grad_()
    with pytest.raises(ValueError, match=r'layers\.0 is deployed'):
        runner_of(tmp_path, model=model).train()


@VISBACKENDS.register_module(force=True)
class Memory(BaseVisBackend):
    """What any backend is given."""

    given: ClassVar[list] = []

    experiment = add_image = add_scalar = _init_env = None

    def add_scalars(self, scalar_dict, step=0, file_path=None, **kwargs):
        self.given.append((step, scalar_dict))


def test_every_backend_is_given_numbers(tmp_path):
    """TensorBoard's takes numbers alone, and the step apart from them."""
    backends = [{'type': 'Memory'}, {'type': 'LocalVisBackend'}]
    visualizer = {'type': 'Visualizer', 'vis_backends': backends}
    Memory.given.clear()
    runner_of(tmp_path, visualizer=visualizer).train()
    given = [(step, line) for step, line in Memory.given if 'path_bias_rate1/layers.0' in line]
    assert [{**line, 'step': step} for step, line in given] == records(tmp_path)
    assert all(type(value) is float for _, line in given for value in line.values())


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard', reason='TensorBoard is not installed')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    each = Rates()
    backends = [{'type': 'LocalVisBackend'}, {'type': 'TensorboardVisBackend'}]
    visualizer = {'type': 'Visualizer', 'vis_backends': backends}
    runner_of(tmp_path, each, visualizer=visualizer).train()
    (folder,) = tmp_path.glob('*/vis_data')
    events = EventAccumulator(str(folder))
    events.Reload()
    for quantity in ('rate1', 'rate2', 'ratio'):
        for i in range(2):
            found = events.Scalars(f'path_bias_{quantity}/layers.{i}')
            assert [event.step for event in found] == [4, 8, 12, 15]
            values = [abs(getattr(each.rates[event.step][i], quantity)) for event in found]
            assert [event.value for event in found] == pytest.approx(values, rel=1e-6)


@pytest.mark.slow
def test_two_processes(tmp_path):
    """The first one writes, once, what it has; names are without those of the wrapper."""
    run_two_processes(Path(__file__), tmp_path / 'run', tmp_path / 'rates.pth')
    found = records(tmp_path / 'run')
    rates = torch.load(tmp_path / 'rates.pth')
    assert [line['step'] for line in found] == [4, 8, 12, 15]
    for line in found:
        assert line == pytest.approx(rates[line['step']])


def train_in_two_processes(folder: Path, file: Path) -> None:
    """This process of the job: data parallel training on the CPU."""
    from mmengine.config import Config

    from acmix_mm.command_line import join_processes

    cfg = Config({'launcher': 'pytorch'})
    join_processes(cfg)
    each = Rates()
    settings = {'launcher': 'pytorch', 'cfg': {'model_wrapper_cfg': dict(cfg.model_wrapper_cfg)}}
    runner_of(folder, each, size=20, **settings).train()
    if get_rank() == 0:
        torch.save({step: expected(rates, step) for step, rates in each.rates.items()}, file)


if __name__ == '__main__':
    train_in_two_processes(Path(sys.argv[1]), Path(sys.argv[2]))
