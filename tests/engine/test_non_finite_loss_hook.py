"""Training stops where the loss is not finite; what mixed precision skips is no fault."""

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from small_runs import Each, Line, make_runner

from acmix_mm.engine import StopAtNonFiniteLossHook


class Spoilt(Line):
    """Its loss is not finite in some calls."""

    def __init__(self, calls, value):
        super().__init__()
        self.calls, self.value, self.call = calls, value, 0

    def forward(self, inputs, mode='tensor'):
        losses = super().forward(inputs, mode)
        self.call += 1
        if self.call in self.calls:
            losses['loss_other'] = losses['loss'] * self.value
        return losses


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_stops_at_the_first(value, tmp_path):
    each = Each()
    runner = make_runner(tmp_path, each, model=Spoilt([8, 9, 10], value), lr=0.03125)
    with pytest.raises(FloatingPointError) as error:
        runner.train()
    assert len(each.inputs) == 8
    message = str(error.value)
    assert 'stopped at iteration 8' in message
    assert f'loss_other {value}' in message
    assert 'learning rate: lr 0.0312;' in message
    assert str(tmp_path / 'epoch_1.pth') in message
    assert not (tmp_path / 'epoch_2.pth').exists()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    assert all(value.isfinite().all() for value in saved.values())


def test_before_the_first_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError, match=r'iteration 1: .*none has been saved'):
        make_runner(tmp_path, model=Spoilt([1], float('nan'))).train()


def test_diverging(tmp_path):
    """A rate far too high, without anything made up."""
    with pytest.raises(FloatingPointError, match='a loss is not finite'):
        make_runner(tmp_path, lr=1e9, size=200).train()


@OPTIM_WRAPPERS.register_module(force=True)
class ScaledOnCPU(OptimWrapper):
    """What AmpOptimWrapper, which insists on a GPU, does with a gradient scaler."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=1024.0, growth_interval=2)

    def backward(self, loss, **settings):
        self.loss_scaler.scale(loss).backward(**settings)
        self._inner_count += 1

    def step(self, **settings):
        self.loss_scaler.step(self.optimizer, **settings)
        self.loss_scaler.update()


def scaled(tmp_path, calls, patience):
    runner = make_runner(tmp_path, model=Spoilt(calls, float('nan')))
    runner.optim_wrapper = {'type': 'ScaledOnCPU', 'optimizer': {'type': 'SGD', 'lr': 0.1}}
    for hook in runner.hooks:
        if isinstance(hook, StopAtNonFiniteLossHook):
            hook.patience = patience
    return runner


def test_skipped_steps_are_no_fault(tmp_path):
    runner = scaled(tmp_path, [2, 3, 6, 7, 8], 4)
    runner.train()
    assert runner.iter == 15
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())


def test_too_many_skipped_steps(tmp_path):
    runner = scaled(tmp_path, [2, 3, 6, 7, 8], 3)
    with pytest.raises(FloatingPointError, match='iteration 8: 3 iterations in a row had losses'):
        runner.train()


def test_patience():
    with pytest.raises(ValueError, match='patience must be at least 1, got 0'):
        StopAtNonFiniteLossHook(patience=0)
