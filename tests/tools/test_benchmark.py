import functools
import json

import benchmark
import pytest
import torch

from acmix_mm.layers import ACmix


@pytest.mark.parametrize('stride', [1, 2])
def test_unfold_formulation_is_the_same_operator(stride):
    """The benchmark compares equals: same outputs and gradients from the same weights."""
    ours, unfold = (cls(16, 16, stride=stride).double() for cls in (ACmix, benchmark.UnfoldACmix))
    unfold.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 10, 12, dtype=torch.float64)
    torch.testing.assert_close(unfold(x), ours(x))
    for module in (ours, unfold):
        module(x).square().sum().backward()
    for a, b in zip(ours.parameters(), unfold.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_operator_suite(capsys, tmp_path):
    file = tmp_path / 'measurements.json'
    arguments = ['--shape', '1', '16', '24', '24', '--rounds', '2', '--json', str(file)]
    benchmark.main(['operator', *arguments])
    content = json.loads(file.read_text())
    names = [(row['candidate'], row['mode']) for row in content['rows']]
    assert len(set(names)) == 6
    for row in content['rows']:
        assert len(row['times']) == 2
        assert min(row['times']) > 0
    out = capsys.readouterr().out
    assert 'unfold' in out
    assert str(file) in out


def test_peak_memory_sees_an_allocation():
    """Against a known amount: 64 MiB of float32 are created by the step, not before it."""
    peak = benchmark.peak_memory(1, 'cpu', functools.partial, torch.ones, 64 * 2**18)
    assert 60 <= peak / 2**20 <= 90


def test_failure_in_the_measured_process(capfd):
    with pytest.raises(RuntimeError, match='measuring peak memory of partial'):
        benchmark.peak_memory(1, 'cpu', functools.partial, torch.ones, -1)
    assert 'RuntimeError' in capfd.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [(['--rounds', '0'], '--rounds must be at least 1'), (['--config', 'x.py'], 'does not exist')],
)
def test_wrong_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        benchmark.parse_args(['detector', *arguments])
    assert message in capsys.readouterr().err
