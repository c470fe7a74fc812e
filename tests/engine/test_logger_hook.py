"""When there are lines in the log, and that each estimates how long training takes."""

import re

import pytest
from small_runs import make_runner

from acmix_mm.engine import PacedLoggerHook


def lines(tmp_path, monkeypatch, by_epoch=True, size=10, **settings) -> list[int]:
    """The iterations after which there are lines."""
    hook = PacedLoggerHook(**settings)
    runner = make_runner(tmp_path, by_epoch=by_epoch, size=size)
    runner._hooks = [h for h in runner.hooks if type(h).__name__ != 'LoggerHook']
    runner.register_hook(hook)
    found = []

    def note(scalars, step=0, file_path=None):
        if 'loss' in scalars:
            found.append(step)

    monkeypatch.setattr(runner.visualizer, 'add_scalars', note)
    texts = []
    monkeypatch.setattr(runner.logger, 'info', texts.append)
    runner.train()
    said = [text for text in texts if '(train)' in text]
    assert len(said) == len(found)
    assert all(re.search(r'eta: \d', text) for text in said)
    return found


def test_short_epochs(tmp_path, monkeypatch):
    """Five iterations: each has a line."""
    assert lines(tmp_path, monkeypatch) == [*range(1, 16)]


def test_a_tenth_of_an_epoch(tmp_path, monkeypatch):
    """100 iterations, three times: after 1, 2, 4 and 8, and after each ten."""
    expected = [1, 2, 4, 8, *range(10, 301, 10)]
    assert lines(tmp_path, monkeypatch, size=200) == expected


def test_at_most_fifty(tmp_path, monkeypatch):
    expected = [1, 2, 4, 8, 16, 32, *range(50, 3001, 50)]
    assert lines(tmp_path, monkeypatch, size=2000) == expected


def test_the_interval_of_a_config_stays(tmp_path, monkeypatch):
    """With the lines at the beginning; at the end of an epoch as mmengine has it."""
    assert lines(tmp_path, monkeypatch, size=200, interval=60) == [
        1, 2, 4, 8, 16, 32, 60, 160, 260
    ]  # fmt: skip


def test_of_iterations(tmp_path, monkeypatch):
    """And after the 5th, where mmengine sees the end of the data."""
    assert lines(tmp_path, monkeypatch, by_epoch=False, interval=7) == [
        1, 2, 4, 5, 7, 14
    ]  # fmt: skip


@pytest.mark.parametrize('interval', [0, 2.5])
def test_refused(interval):
    with pytest.raises((TypeError, ValueError)):
        PacedLoggerHook(interval=interval)
