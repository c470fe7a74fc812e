"""Programs of tests that run in two processes: how tests start them, and how they end."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import distributed


def run_two_processes(program: Path, *arguments) -> None:
    """Start a program by torchrun, with this folder on its path; it has to succeed."""
    launcher = ['torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    command = map(str, [sys.executable, '-m', *launcher, program, *arguments])
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get('PYTHONPATH')]))
    result = subprocess.run(
        list(command),
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def parallel_step(tasks: list[tuple], folder: Path) -> list[tuple[dict, dict]]:
    """What both processes get for each model of :mod:`parallel_step`."""
    torch.save(tasks, folder / 'tasks.pth')
    program = Path(__file__).with_name('parallel_step.py')
    run_two_processes(program, folder / 'tasks.pth', folder / 'results.pth')
    return list(zip(*torch.load(folder / 'results.pth'), strict=True))


def save_both_and_leave(results: object, file: str) -> None:
    """Write what both processes have, a list of two, and end the process."""
    gathered = [None, None]
    distributed.all_gather_object(gathered, results)
    if distributed.get_rank() == 0:
        torch.save(gathered, file)
    # Not through the destructors: once in many runs, a thread outlives its group, and aborts.
    distributed.barrier()
    os._exit(0)
