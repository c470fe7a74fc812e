"""Ends of launched processes: one line, an exit code, nobody left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from acmix_mm.launch import options

START = """
import os, signal, sys, time
from pathlib import Path
rank, restarts = int(os.environ['RANK']), int(os.environ['TORCHELASTIC_RESTART_COUNT'])
Path(sys.argv[1], f'{rank}-{restarts}').write_text(str(os.getpid()))
while len(list(Path(sys.argv[1]).glob(f'*-{restarts}'))) < 2:
    time.sleep(0.01)
"""
WAIT = 'time.sleep(100)\n'


@pytest.fixture
def start(tmp_path):
    """Launch two processes of a program; each puts its id into a file in ``tmp_path``."""
    launched = []

    def launch(program: str, **variables: str) -> subprocess.Popen:
        file = tmp_path / 'program.py'
        file.write_text(START + program)
        command = [sys.executable, '-m', 'acmix_mm.launch', '2', str(file), str(tmp_path)]
        environment = {**os.environ, **variables}
        launched.append(
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return launched[-1]

    yield launch
    for process in launched:
        process.kill()
        process.communicate()


def end(launcher: subprocess.Popen, folder: Path) -> str:
    """What a launcher said; after its end none of its processes is there."""
    _, said = launcher.communicate(timeout=100)
    for file in folder.glob('[01]-*'):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
    assert 'Traceback' not in said
    return said


@pytest.mark.parametrize(
    ('what', 'code', 'how'),
    [
        ('os.kill(os.getpid(), signal.SIGKILL)', 128 + 9, 'was killed by SIGKILL'),
        pytest.param('sys.exit(75)', 75, 'ended with exit code 75', marks=pytest.mark.slow),
    ],
)
def test_one_process_ends(start, tmp_path, what, code, how):
    launcher = start(f'if rank == 1:\n    {what}\n{WAIT}')
    said = end(launcher, tmp_path)
    assert launcher.returncode == code
    assert said.splitlines()[-1] == f'error: process 1 {how}; so all are ended'


def test_what_a_killed_process_takes_along(start, tmp_path):
    """The other ends of it before the launcher looks; named is the killed one."""
    launcher = start("""
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
number = ''
while not number:  # the file may be there before what is in it
    number = Path(sys.argv[1], f'1-{restarts}').read_text()
stat = Path('/proc', number, 'stat')
try:
    while stat.read_text().split()[2] != 'Z':
        pass
except OSError:  # the launcher has looked in between
    pass
sys.exit(1)
""")
    said = end(launcher, tmp_path)
    assert said.splitlines()[-1] == 'error: process 1 was killed by SIGKILL; so all are ended'
    assert launcher.returncode == 128 + 9


@pytest.mark.parametrize(
    ('number', 'code'),
    [
        (signal.SIGTERM, os.EX_TEMPFAIL),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_signals_reach_the_processes(start, tmp_path, number, code):
    """They have the time to save, here a file each."""
    launcher = start(
        f'def save(*_):\n    time.sleep(0.5)\n    Path(sys.argv[1], f"saved{{rank}}").touch()\n'
        f'    sys.exit(75)\nsignal.signal({int(number)}, save)\n'
        f'Path(sys.argv[1], f"ready{{rank}}").touch()\n{WAIT}'
    )
    while len(list(tmp_path.glob('ready*'))) < 2:
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(number)
    said = end(launcher, tmp_path)
    assert launcher.returncode == code
    assert said.splitlines()[-1] == f'all processes are ended by {number.name}'
    assert {file.name for file in tmp_path.glob('saved*')} == {'saved0', 'saved1'}


@pytest.mark.slow
def test_restarts(start, tmp_path):
    launcher = start(
        'if rank == 1 and restarts < 2:\n    os.kill(os.getpid(), signal.SIGKILL)\n'
        'if restarts < 2:\n    time.sleep(100)\n',
        MAX_RESTARTS='2',
    )
    end(launcher, tmp_path)
    assert launcher.returncode == 0
    assert len(list(tmp_path.glob('[01]-[012]'))) == 6


def test_one_machine_takes_a_free_port():
    assert options({'PORT': '1234'}) == ['--standalone', '--max-restarts=0']
    assert options({'MAX_RESTARTS': '3'}) == ['--standalone', '--max-restarts=3']


def test_several_machines():
    words = options({'NNODES': '3', 'NODE_RANK': '2', 'MASTER_ADDR': 'host', 'PORT': '1234'})
    assert words == ['--nnodes=3', '--node-rank=2', '--master-addr=host', '--master-port=1234']
    assert options({'NNODES': '2'})[1:] == [
        '--node-rank=0', '--master-addr=127.0.0.1', '--master-port=29500',
    ]  # fmt: skip
