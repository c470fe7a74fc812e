"""The shell scripts hand the right command to Python and srun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture
def launch(tmp_path):
    """Run a script with stand-ins for the launchers that print their arguments."""
    for name in ('python', 'srun', 'my python'):
        (tmp_path / name).write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
        (tmp_path / name).chmod(0o755)

    read = ('PYTHON', 'SRUN_ARGS')

    def run(script: str, *arguments: str, **variables: str) -> list[str]:
        path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
        environment = {name: value for name, value in os.environ.items() if name not in read}
        result = subprocess.run(
            [TOOLS / script, *arguments], env={**environment, **variables, 'PATH': path},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return result.stdout.splitlines()

    return run


def test_train(launch):
    """By the Python that is active."""
    words = launch('dist_train.sh', 'my config.py', '8', '--amp')
    assert words[:3] == ['-m', 'acmix_mm.launch', '8']
    assert Path(words[3]).samefile(TOOLS / 'train.py')
    assert words[4:] == ['my config.py', '--launcher', 'pytorch', '--amp']


def test_evaluate(launch):
    words = launch('dist_test.sh', 'c.py', 'c.pth', '4', '--out', 'o.pkl')
    assert words[:3] == ['-m', 'acmix_mm.launch', '4']
    assert Path(words[3]).samefile(TOOLS / 'test.py')
    assert words[4:] == ['c.py', 'c.pth', '--launcher', 'pytorch', '--out', 'o.pkl']


def test_restarts_of_several_machines():
    result = subprocess.run(
        [TOOLS / 'dist_train.sh', 'c.py', '2'], capture_output=True, text=True,
        env={**os.environ, 'NNODES': '2', 'MAX_RESTARTS': '1', 'PYTHON': sys.executable},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == 'error: MAX_RESTARTS must be 0 for several machines, got 1\n'


def test_another_python(launch, tmp_path):
    """Given by its path, which may hold white space; srun gets it, too."""
    other = str(tmp_path / 'my python')
    assert launch('dist_test.sh', 'c.py', 'c.pth', '2', PYTHON=other)[1] == 'acmix_mm.launch'
    for arguments in (('slurm_train.sh', 'p', 'j', 'c.py', 'w'), ('slurm_test.sh', *'pjcc')):
        words = launch(*arguments, PYTHON=other)
        assert words[words.index('-u') - 1] == other


def test_slurm(launch):
    words = launch(
        'slurm_train.sh', 'part', 'job', 'c.py', 'work', '--resume',
        GPUS='4', GPUS_PER_NODE='8', SRUN_ARGS='--mem 8G',
    )  # fmt: skip
    assert {'--job-name=job', '--gres=gpu:4', '--ntasks=4', '--ntasks-per-node=4'} < set(words)
    assert words[:2] == ['-p', 'part']
    assert words[words.index('--mem') + 1] == '8G'
    assert words[-6:] == ['c.py', '--work-dir', 'work', '--launcher', 'slurm', '--resume']
    words = launch('slurm_test.sh', 'part', 'job', 'c.py', 'c.pth', GPUS='16')
    assert {'--gres=gpu:8', '--ntasks=16', '--ntasks-per-node=8'} < set(words)
    assert words[-4:] == ['c.py', 'c.pth', '--launcher', 'slurm']


@pytest.mark.parametrize('script', sorted(p.name for p in TOOLS.glob('*.sh')))
def test_too_few_arguments(script):
    result = subprocess.run([TOOLS / script, 'x'], capture_output=True, text=True)
    assert result.returncode == 2
    assert f'tools/{script}' in result.stderr
