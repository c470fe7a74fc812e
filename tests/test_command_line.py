import subprocess
import sys

import pytest
import torch

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
@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_keep_freed_memory():
    grown = {}
    for policy in ('keep', 'default'):
        result = subprocess.run(
            [sys.executable, '-c', PROGRAM, policy], capture_output=True, text=True, check=True
        )
        grown[policy] = int(result.stdout)
    assert grown['default'] < 20
    assert grown['keep'] > 100
