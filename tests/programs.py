"""Programs of tools/ run as users do, and what they leave."""

import json
import subprocess
import sys
from pathlib import Path


def program(name: str, *arguments: str) -> str:
    """What a program of tools/ prints, in a process of its own: Runners share state within one."""
    command = [sys.executable, f'tools/{name}.py', *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def scalars(work_dir: Path) -> list[dict]:
    """What one run logged, a dict for each time."""
    (file,) = work_dir.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in file.read_text().splitlines()]
