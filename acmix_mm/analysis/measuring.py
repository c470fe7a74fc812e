"""Time and peak memory of steps, side by side in one run."""

import contextlib
import ctypes
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from .steps import Case, Step, Unavailable

MIN_SECONDS = 0.02  # of a round


@dataclass(frozen=True)
class Candidate:
    """One entry of a comparison; ``build(*arguments, case)`` gives its step, in any process."""

    name: str
    build: Callable[..., Step]
    arguments: tuple
    case: Case
    notes: dict = field(default_factory=dict)  # more about it, for the row of its results

    def row(self) -> dict:
        case = self.case
        given = {'shape': list(case.shape), 'mode': case.mode, 'dtype': case.precision}
        return {'candidate': self.name, **given, **self.notes, 'times': [], 'peak': None}


def measure(
    candidates: list[Candidate],
    rounds: int = 7,
    warmup: int = 2,
    memory: bool = True,
    threads: int | None = None,
    advance: Callable[[str], object] = lambda what: None,
) -> list[dict]:
    """Time and peak memory of candidates that take turns, every round beginning with another one.

    Args:
        candidates (list[Candidate]): All on one device.
        rounds (int): Timed rounds; steps shorter than 20 ms are repeated within one. Default: 7.
        warmup (int): Untimed steps before, at least 1. Default: 2.
        memory (bool): Also measures what a step needs at most beyond what was held before it: on
            CUDA in this process, on a CPU in a fresh one for each candidate (Linux).
            Default: True.
        threads (int | None): Of those fresh processes. Default: None, for this one's.
        advance (Callable[[str], object]): Is told what is done, ``rounds`` times and once for each
            candidate, on a CPU twice where memory is measured.

    Returns:
        list[dict]: A row for each candidate: its ``candidate`` name, shape, mode, dtype and notes;
        ``times``, seconds of a step by rounds; ``repeats`` within a round; ``peak`` and ``weights``
        in bytes; ``error``, the reason, only where it failed, ``unavailable`` where there is
        nothing to measure.
    """
    rows = [candidate.row() for candidate in candidates]
    cuda = any(candidate.case.device != 'cpu' for candidate in candidates)
    ready = []
    for candidate, row in zip(candidates, rows, strict=True):
        advance(f'{candidate.name}: warm-up')
        with note_failure(row):
            step = candidate.build(*candidate.arguments, candidate.case)
            seconds = [timed(step, 1, cuda) for _ in range(warmup)][-1]
            row['repeats'] = min(max(round(MIN_SECONDS / seconds), 1), 100)
            row['weights'] = step.weights
            ready.append((step, row))
    for index in range(rounds):
        turn = index % max(len(ready), 1)
        for step, row in ready[turn:] + ready[:turn]:
            if measured(row):
                with note_failure(row):
                    row['times'].append(timed(step, row['repeats'], cuda))
        advance(f'round {index + 1} of {rounds}')
    if cuda and memory:
        for step, row in ready:
            if measured(row):
                with note_failure(row):
                    row['peak'] = peak_allocated(step)
    step = None
    ready.clear()
    if not cuda and memory:
        for candidate, row in zip(candidates, rows, strict=True):
            advance(f'{candidate.name}: memory')
            if measured(row):
                arguments = (*candidate.arguments, candidate.case)
                with note_failure(row):
                    row['peak'] = peak_memory(
                        threads or torch.get_num_threads(), candidate.build, *arguments
                    )
    return rows


def measured(row: dict) -> bool:
    """Whether there is something to measure, and nothing has failed so far."""
    return 'error' not in row and 'unavailable' not in row


@contextlib.contextmanager
def note_failure(row: dict) -> Iterator[None]:
    """Whatever one candidate raises, out of memory most likely, goes into its row."""
    try:
        yield
    except Unavailable as reason:
        row['unavailable'] = str(reason)
    except Exception as error:
        row['error'] = f'{type(error).__name__}: {error}'
        tqdm.write(f'{row["candidate"]} failed: {row["error"]}', file=sys.stderr)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def timed(step: Step, repeats: int, cuda: bool) -> float:
    """Seconds of one step, the mean of ``repeats``; gradients are dropped between steps."""
    if cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
    start = time.perf_counter()
    for index in range(repeats):
        if index:
            step.reset()
        step()
    seconds = time.perf_counter() - start
    if cuda:
        end.record()
        torch.cuda.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
    step.reset()
    return seconds / repeats


def peak_allocated(step: Step) -> int:
    """Bytes that a step allocates at most on the CUDA device, beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    step.reset()
    return torch.cuda.max_memory_allocated() - held


def peak_memory(threads: int, build: Callable, *arguments) -> int:
    """Bytes that one call of ``build(*arguments)()`` needs at most, in a fresh process."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, threads, build, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f'measuring peak memory of {build.__name__}{arguments} failed with exit code '
            f'{process.exitcode}; is there enough memory?'
        ) from None
    finally:
        process.join()


def _measure_peak(connection, threads: int, build: Callable[..., Step], arguments: tuple) -> None:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # these functions are not in every C library
        # Every tensor (but the smallest) is a mapping of its own, gone when freed: without the gaps
        # in the heap that make the peak differ from run to run. -3 is M_MMAP_THRESHOLD.
        libc.mallopt(-3, 2**16)
    step = build(*arguments)
    # The first step imports modules and loads code, which can be more than the step itself needs.
    step.small()
    step.reset()
    with contextlib.suppress(AttributeError):
        libc.malloc_trim(0)
    # getrusage would also see what the parent held; this forgets earlier peaks.
    Path('/proc/self/clear_refs').write_text('5')
    before = _resident('VmRSS')
    step()
    connection.send(_resident('VmHWM') - before)


def _resident(kind: str) -> int:
    """Resident memory of this process now (VmRSS) or at its peak (VmHWM), bytes (Linux)."""
    status = Path('/proc/self/status').read_text()
    return int(re.search(rf'^{kind}:\s+(\d+) kB', status, re.MULTILINE)[1]) * 1024
