"""A signal ends a training after its iteration, and nothing is lost."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import Hook
from small_runs import Each, make_runner, validation, weights

from acmix_mm.engine import newest_checkpoint


def send(number):
    return lambda: os.kill(os.getpid(), number)


def interrupt(work_dir, iteration, number=signal.SIGTERM, **settings):
    """Train until the signal; the Each of the part that was trained."""
    each = Each(iteration, send(number))
    with pytest.raises(SystemExit) as end:
        make_runner(work_dir, each, **settings).train()
    assert end.value.code == 75
    return each


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_saves_and_goes_on(by_epoch, number, tmp_path):
    """Twice: within the first period, and at the end of the second."""
    settings = {'by_epoch': by_epoch, 'workers': 2 if number == signal.SIGTERM else 0}
    whole = make_runner(tmp_path / 'whole', Each(), by_epoch=by_epoch)
    whole.train()
    run = tmp_path / 'run'
    before = signal.getsignal(number)
    first = interrupt(run, 3, number, **settings)
    assert signal.getsignal(number) is before
    assert len(first.inputs) == 3
    assert newest_checkpoint(run) == str(run / 'interrupted_iter_3.pth')
    second = interrupt(run, 10, number, resume=True, **settings)
    assert len(second.inputs) == 7
    each = Each()
    last = make_runner(run, each, resume=True, **settings)
    last.train()
    torch.testing.assert_close(weights(last), weights(whole), rtol=0, atol=0)
    (undisturbed,) = [hook for hook in whole.hooks if isinstance(hook, Each)]
    inputs = first.inputs + second.inputs + each.inputs
    torch.testing.assert_close(inputs, undisturbed.inputs, rtol=0, atol=0)
    kept = sorted(path.name for path in run.glob('*.pth'))
    assert kept == sorted(path.name for path in (tmp_path / 'whole').glob('*.pth'))


def test_accumulated_gradients_are_not_lost(tmp_path):
    """The iteration that is finished is the one that updates the weights."""

    def accumulate(runner):
        runner.optim_wrapper['accumulative_counts'] = 2
        return runner

    settings = {'by_epoch': False}
    whole = accumulate(make_runner(tmp_path / 'whole', **settings))
    whole.train()
    with pytest.raises(SystemExit):
        accumulate(make_runner(tmp_path / 'run', Each(7, send(signal.SIGTERM)), **settings)).train()
    assert newest_checkpoint(tmp_path / 'run') == str(tmp_path / 'run' / 'interrupted_iter_8.pth')
    resumed = accumulate(make_runner(tmp_path / 'run', resume=True, **settings))
    resumed.train()
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


class SignalInValidation(Hook):
    """Sends the signal in the second validation, and counts validations that came to their end."""

    def __init__(self, send=None):
        self.send, self.ended = send, 0

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.send is not None and runner.epoch == 2:
            self.send()

    def after_val_epoch(self, runner, metrics=None):
        self.ended += 1


def test_validation_is_repeated(tmp_path):
    """Its best checkpoint is not lost."""
    scores = [{'a': 0.1}, {'a': 0.3}, {'a': 0.2}]
    settings = {'checkpoint': {'save_best': 'a', 'rule': 'greater'}, **validation(scores)}
    hook = SignalInValidation(send(signal.SIGTERM))
    runner = make_runner(tmp_path, **settings)
    runner.register_hook(hook)
    with pytest.raises(SystemExit):
        runner.train()
    assert hook.ended == 1
    assert [path.name for path in tmp_path.glob('best*')] == ['best_a_epoch_1.pth']
    hook = SignalInValidation()
    runner = make_runner(tmp_path, resume=True, **settings)
    runner.register_hook(hook)
    runner.train()
    assert hook.ended == 2
    assert [path.name for path in tmp_path.glob('best*')] == ['best_a_epoch_2.pth']


@pytest.mark.slow
def test_a_training_that_fails_ends(tmp_path):
    """Workers, which outlive a signal, do not keep the process."""
    code = f"""
import sys
sys.path.insert(0, 'tests')
from small_runs import Each, make_runner

def fail():
    raise ValueError('fails')

each = Each(2, fail)
make_runner({str(tmp_path)!r}, each, workers=2, persistent=True).train()
"""
    result = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == 'ValueError: fails'
