"""``python -m acmix_mm.check``: right backends pass, wrong ones do not."""

import re

import pytest
import torch

from acmix_mm.check import CASES, DTYPES, Numbers, Shape, check, main
from acmix_mm.ops import _dispatch, available_backends
from acmix_mm.ops._dispatch import OPERATORS, Implementation
from acmix_mm.ops.group_conv import conv2d

SMALL = (Shape((5, 6), heads=2, dim=2, kernel_size=3, stride=2),)
COUNT = len(DTYPES)


@pytest.mark.parametrize('operator', CASES)
def test_every_operator(capsys, operator):
    """A line for each dtype of each backend; Triton has no float64."""
    outcomes = list(check(operator, SMALL))
    lines = capsys.readouterr().out.splitlines()
    backends = [b for b in OPERATORS.get(operator, ['torch']) if b in available_backends()]
    assert outcomes == [True] * (COUNT * len(backends) - ('triton' in backends))
    assert all(re.match(rf'{operator} +\w+ +cpu +\w+ +0\.\d+  ok$', line) for line in lines)
    assert len(lines) == len(outcomes)


def test_environment_and_summary(capsys, monkeypatch):
    monkeypatch.setattr(_dispatch.native_backend, 'MISSING', 'they were not built')
    monkeypatch.setattr(_dispatch.triton_backend, 'MISSING', 'interpreted, it is slow')
    monkeypatch.setenv('ATEN_CPU_CAPABILITY', 'avx2')
    assert main(['--operators', 'group_conv', 'norm_relu_conv']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f'torch: {torch.__version__}, built for' in '\n'.join(lines)
    assert 'backend torch: available' in lines
    assert 'backend native: not available: they were not built' in lines
    assert 'ATEN_CPU_CAPABILITY: avx2' in lines
    assert not any(line.startswith('group_conv         native') for line in lines)
    assert lines[-1] == f'{2 * COUNT} of {2 * COUNT} comparisons ok'


def wrong_result(*args):
    return 1.1 * conv2d(*args)


def wrong_gradient(*args):
    out = conv2d(*args)
    return out.detach() + 0.5 * (out - out.detach())


def not_a_number(*args):
    return conv2d(*args) * torch.nan


def wrong_dtype(*args):
    return conv2d(*(a.float() if isinstance(a, torch.Tensor) else a for a in args))


def raises(*args):
    raise RuntimeError('no such\nkernel')


@pytest.mark.parametrize(
    ('function', 'failures'),
    [
        (wrong_result, COUNT),
        (wrong_gradient, COUNT),
        (not_a_number, COUNT),
        (wrong_dtype, COUNT - 1),  # all but float32
        (raises, COUNT),
    ],
)
def test_wrong_backend(capsys, monkeypatch, function, failures):
    """Named in its lines and by the exit status; all other comparisons go on."""
    monkeypatch.setitem(OPERATORS['group_conv'], 'torch', Implementation(function))
    monkeypatch.setattr(_dispatch.triton_backend, 'MISSING', 'interpreted, it is slow')
    assert main(['--operators', 'group_conv', 'norm_relu_conv']) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if 'FAILED' in line]
    assert len(failed) == failures
    assert all(line.startswith('group_conv         torch ') for line in failed)
    if function is raises:
        assert all(line.endswith('FAILED  RuntimeError: no such kernel') for line in failed)
    total = COUNT * (2 + ('native' in available_backends()))
    assert out.endswith(f'\n{total - failures} of {total} comparisons ok\n')


def test_unknown_operator_is_refused(capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['--operators', 'convolution'])
    assert "invalid choice: 'convolution'" in capsys.readouterr().err


def test_every_dtype_holds_the_inputs():
    """So that one exact result serves all of them."""
    numbers = Numbers().normal(100_000)
    for dtype in DTYPES:
        assert torch.equal(numbers.to(dtype).double(), numbers)
    assert 0.98 < numbers.std() < 1.02
