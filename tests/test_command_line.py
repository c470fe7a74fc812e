import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from processes import run_two_processes

from acmix_mm.command_line import join_processes

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')

PROGRAM = """
import re, sys
from pathlib import Path
import torch
from acmix_mm.command_line import keep_freed_memory
def resident():
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmRSS:\\s+(\\d+) kB', status)[1]) >> 10
if sys.argv[1] == 'keep':
    keep_freed_memory()
before = resident()
maps = torch.ones(2**25)  # 128 MiB
del maps
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@without_gpu
def test_keep_freed_memory():
    grown = {}
    for policy in ('keep', 'default'):
        result = subprocess.run(
            [sys.executable, '-c', PROGRAM, policy], capture_output=True, text=True, check=True
        )
        grown[policy] = int(result.stdout)
    assert grown['default'] < 20
    assert grown['keep'] > 100


@without_gpu
def test_once(tmp_path):
    """One process acts; both have what it did to the config."""
    log, file = tmp_path / 'log', tmp_path / 'results'
    run_two_processes(Path(__file__).with_name('act_once.py'), log, file)
    assert log.read_text() == '0 acted\n'
    first, second = torch.load(file)
    assert first == second == {'weights': 'found by 0', 'backend': 'gloo'}


@without_gpu
def test_once_ends_all_processes(tmp_path):
    """By a message, and by exit codes of both; a process that went on would write."""
    log, file = tmp_path / 'log', tmp_path / 'results'
    with pytest.raises(AssertionError) as failure:
        run_two_processes(Path(__file__).with_name('act_once.py'), log, file, 'error: no weights')
    assert str(failure.value).count('error: no weights') == 1
    assert log.read_text() == '0 acted\n0 exits with error: no weights\n1 exits with 1\n'
    assert not file.exists()


@without_gpu
@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launchers_that_need_a_gpu(launcher):
    with pytest.raises(SystemExit, match=rf'error: --launcher {launcher} needs a GPU'):
        join_processes(Config({'launcher': launcher}))
