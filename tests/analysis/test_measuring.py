"""Time and memory of known amounts of work."""

import functools

import pytest
import torch

from acmix_mm.analysis.measuring import Candidate, measure, peak_memory
from acmix_mm.analysis.steps import Case, Step, Unavailable


def test_peak_memory_sees_the_step_only():
    """A known amount, after more of it in the step that loads code."""
    run, small = (functools.partial(torch.ones, mib * 2**18) for mib in (64, 96))
    peak = peak_memory(1, Step, run, small, [])
    assert 63 <= peak / 2**20 <= 70


def test_measured_process_has_its_threads():
    check = 'lambda: __import__("torch").get_num_threads() == 3 or 1 / 0'
    run = functools.partial(eval, f'({check})()')
    assert peak_memory(3, Step, run, run, []) < 2**23


def test_failure_in_the_measured_process(capfd):
    with pytest.raises(RuntimeError, match='measuring peak memory of Step'):
        peak_memory(1, Step, functools.partial(torch.ones, -1), int, [])
    assert 'RuntimeError' in capfd.readouterr().err


def test_candidates_take_turns_and_one_may_fail():
    calls = []

    def build(name: str, case: Case) -> Step:
        if name == 'bad':
            raise ValueError('no')
        if name == 'missing':
            raise Unavailable('not installed')
        return Step(lambda: calls.append(name), int, [])

    case = Case((1,), False)
    candidates = [Candidate(n, build, (n,), case) for n in ('a', 'bad', 'missing', 'b', 'c')]
    rows = measure(candidates, rounds=3, warmup=1, memory=False)
    assert [row.get('error') for row in rows] == [None, 'ValueError: no', None, None, None]
    assert [row.get('unavailable') for row in rows] == [None, None, 'not installed', None, None]
    assert [len(row['times']) for row in rows] == [3, 0, 0, 3, 3]
    timed = calls[3:]
    order = [n for i, n in enumerate(timed) if i == 0 or timed[i - 1] != n]
    assert ''.join(order) == 'abcbcacab'
