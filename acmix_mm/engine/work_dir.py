"""Work directories: the checkpoint to go on from, and what an earlier run has left."""

import math
import os
import time
from pathlib import Path

import torch

from ..checkpoints import make_checkpoints_loadable, read_checkpoint

LAST = 'last_checkpoint'  # mmengine's file that names the newest one
# What SummaryHook writes.
SUMMARY, CURVES, METRICS = 'summary.md', 'summary.png', 'metrics.json'
INTERRUPTED = 'interrupted_iter_{}.pth'
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth', 'best_{}.pth', INTERRUPTED)


def is_remote(folder: str | Path) -> bool:
    """Whether mmengine would look for it elsewhere than on this machine."""
    return '://' in str(folder)


def checkpoint_folder(work_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Where mmengine's ``CheckpointHook(out_dir=...)`` puts checkpoints."""
    return Path(work_dir) if out_dir is None else Path(out_dir, Path(work_dir).name)


def newest_checkpoint(work_dir: str | Path, out_dir: str | Path | None = None) -> str | None:
    """The checkpoint from which a run in a work directory can go on.

    That is the one that ``last_checkpoint`` names, by its file name, so that a copied or moved
    folder has its own, or what has been written since. Where these are not there or not whole, it
    is the whole one of most iterations. Each damaged one that is passed over is named in a printed
    line.

    Args:
        work_dir (str | Path): The work directory, which need not exist.
        out_dir (str | Path | None): Of the ``CheckpointHook``. Default: None.

    Returns:
        str | None: None if there are none that a run can go on from.

    Raises:
        ValueError: If there are some and none of them is whole.
    """
    last = Path(work_dir, LAST)
    named = last.read_text(errors='replace').strip() if last.is_file() else ''
    if out_dir is not None and is_remote(out_dir):
        return named or None
    folder = checkpoint_folder(work_dir, out_dir)
    file = folder / Path(named).name
    since = file.stat().st_mtime if named and file.is_file() else 0.0

    def rank(file: Path) -> tuple[bool, float]:
        # Those of an earlier run in the same folder may have more iterations.
        return file.stat().st_mtime >= since, _iterations(file)

    damaged = 0
    files = [file for file in folder.glob('*.pth') if not file.name.startswith('.')]
    for file in sorted(files, key=rank, reverse=True):
        try:
            checkpoint = read_checkpoint(str(file))
        except ValueError as error:
            print(f'passed over: {error}')
            damaged += 1
        else:
            if 'optimizer' in checkpoint:  # a run cannot go on from others, such as the best
                return str(file)
    if damaged:
        raise ValueError(f'no checkpoint of {folder} is whole, {damaged} are damaged')
    return None


def _iterations(file: Path) -> float:
    """After how many iterations a checkpoint was saved; infinity for what tells nothing."""
    make_checkpoints_loadable()
    if not file.is_file():
        return math.inf  # a pipe would be waited for
    try:
        # Mapped into memory, weights are not read.
        checkpoint = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        return checkpoint['meta']['iter']
    except Exception:  # as anything may be raised for a damaged file
        return math.inf


def set_aside(
    work_dir: str | Path,
    start: str | Path | None = None,
    out_dir: str | Path | None = None,
    template: str | None = None,
) -> dict[Path, Path]:
    """Move what a run would write over into a folder ``before_<time>``: checkpoints and summary.

    Args:
        work_dir (str | Path): The work directory, which need not exist.
        start (str | Path | None): The checkpoint that the run goes on from; those of as many
            iterations or fewer stay. Default: None, nothing stays.
        out_dir (str | Path | None): Of the ``CheckpointHook``. Default: None.
        template (str | None): Its ``filename_tmpl``. Default: None.

    Returns:
        dict[Path, Path]: Where each file is now, by where it was.
    """
    if out_dir is not None and is_remote(out_dir):
        return {}
    folder = checkpoint_folder(work_dir, out_dir)
    patterns = [t.replace('{}', '*') for t in (*TEMPLATES, *filter(None, [template]))]
    least = -1 if start is None else read_checkpoint(str(start))['meta']['iter']
    files = {f for pattern in patterns for f in folder.glob(pattern) if _iterations(f) > least}
    if start is None:
        names = ([LAST] if files else []) + [SUMMARY, CURVES, METRICS]
        files |= {file for name in names if (file := Path(work_dir, name)).exists()}
    target = folder / f'before_{time.strftime("%Y%m%d_%H%M%S")}'
    moved = {file: target / file.name for file in sorted(files)}
    if moved:
        target.mkdir(parents=True)
    for old, new in moved.items():
        os.replace(old, new)
    return moved
