"""What came of a training, in one page with a picture."""

import json
import math
import resource
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import get_world_size, is_main_process, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..files import write_figure, write_whole
from ..version import __version__
from .work_dir import CURVES, METRICS, SUMMARY

STATE = 'summary'  # in the message hub, so in checkpoints
LOSSES = 8  # parts of the loss that are drawn
PACKAGES = {  # by what OneDL calls them, too
    'torch': ('torch',),
    'mmengine': ('onedl-mmengine', 'mmengine'),
    'mmcv': ('onedl-mmcv', 'mmcv'),
    'mmdet': ('onedl-mmdetection', 'mmdet'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain'),
}


class SummaryHook(Hook):
    """At the end of training, write ``summary.md`` and ``summary.png`` into the work directory.

    The page has config, commit, device, versions, time and memory, the metrics of the best and the
    last checkpoint, and where these are; the picture has losses, metrics and learning rate over
    iterations. Metrics of each validation are in ``metrics.json`` from the first one on. What was
    before a resumption counts: time, memory and losses come with the checkpoint, metrics from
    ``metrics.json`` beside it or in the work directory.
    """

    priority = 'LOWEST'  # after the last checkpoint

    def __init__(self):
        self.validations: list[dict] = []
        self.seconds = self.memory = 0.0
        self.start = math.nan

    def before_train(self, runner: Runner) -> None:
        self.validations, self.seconds, self.memory = [], 0.0, 0.0
        self.start = time.monotonic()
        if not runner.iter:
            return
        state = runner.message_hub.runtime_info.get(STATE, {})
        self.seconds, self.memory = state.get('seconds', 0.0), state.get('memory', 0.0)
        for folder in (Path(runner._load_from or '').parent, Path(runner.work_dir)):
            if (folder / METRICS).is_file():
                rows = json.loads((folder / METRICS).read_text())
                self.validations = [row for row in rows if row['iter'] <= runner.iter]
                break

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None):
        self._note(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if runner._train_loop is None or isinstance(runner._train_loop, dict) or not metrics:
            return  # validation alone
        row = {'iter': runner.iter, 'epoch': runner.epoch, 'metrics': _numbers(metrics)}
        # One that was interrupted, or done again after resumption, counts once.
        self.validations = [r for r in self.validations if r['iter'] < runner.iter] + [row]
        if is_main_process():
            write_whole(Path(runner.work_dir, METRICS), json.dumps(self.validations, indent=1))

    def after_train(self, runner: Runner) -> None:
        self._note(runner)
        self._write(runner)

    def _note(self, runner: Runner) -> None:
        """Keep in checkpoints how long it took and the memory that it needed."""
        state = {
            'seconds': self.seconds + time.monotonic() - self.start,
            'memory': max(self.memory, peak_memory()),
        }
        runner.message_hub.update_info(STATE, state)

    @master_only
    def _write(self, runner: Runner) -> None:
        folder = Path(runner.work_dir)
        write_figure(folder / CURVES, draw(runner, self.validations), dpi=110)
        write_whole(folder / SUMMARY, page(runner, self.validations))


def peak_memory() -> float:
    """Bytes: of the GPU where there is one, otherwise of this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _numbers(metrics: dict) -> dict[str, float]:
    """Those of the metrics that are single numbers."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float, np.number)) or getattr(value, 'ndim', None) == 0
    }


def measured(validations: list[dict]) -> list[str]:
    """Names of the metrics; COCO's are -1 throughout for sizes of which there is no object."""
    last = validations[-1]['metrics'] if validations else ()
    return [name for name in last if any(v['metrics'].get(name, -1) != -1 for v in validations)]


# The page.


def page(runner: Runner, validations: list[dict]) -> str:
    """The summary as Markdown, which is readable as it is, too."""
    state = runner.message_hub.get_info(STATE)
    facts = {
        'config': runner.cfg.filename or 'not of a file',
        'commit': commit(Path.cwd()) or 'none, the folder is in no git repository',
        'versions': versions(),
        'device': device(),
        'data': data(runner),
        'length': length(runner),
        'finished': time.strftime('%Y-%m-%d %H:%M:%S %z'),
        'wall time': f'{timedelta(seconds=round(state["seconds"]))}, with validation',
        'peak memory': f'{state["memory"] / 2**30:.2f} GiB of the '
        + ('GPU' if torch.cuda.is_available() else 'process, validation included'),
    }
    best = best_of(runner, validations)
    checkpoints = checkpoints_of(runner)
    lines = [f'# {Path(facts["config"]).stem}', '', *table({'': 'training', **facts}), '']
    lines += ['```bash', shlex.join([Path(sys.executable).name, *sys.argv]), '```', '']
    if validations:
        columns = {f'last ({moment(runner, validations[-1])})': validations[-1]['metrics']}
        if best is not None:
            columns = {f'best ({moment(runner, best)})': best['metrics'], **columns}
        rows = {'metric': ' | '.join(columns)}
        for name in measured(validations):
            rows[name] = ' | '.join(f'{c.get(name, math.nan):.4g}' for c in columns.values())
        lines += [*table(rows), '']
    else:
        lines += ['There was no validation.', '']
    lines += [f'![Losses, metrics and learning rate]({CURVES})', '']
    lines += [*table({'': 'file', **checkpoints, 'log': str(runner.log_dir)}), '']
    return '\n'.join(lines)


def table(rows: dict[str, str]) -> list[str]:
    """Lines of a Markdown table, the first row its head; cells may hold further columns."""
    cells = [[name, *text.split(' | ')] for name, text in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        '| ' + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + ' |'
        for row in cells
    ]
    return [lines[0], '|' + '|'.join('-' * (w + 2) for w in widths) + '|', *lines[1:]]


def commit(folder: Path) -> str | None:
    """The commit of a folder's git repository, None where there is none."""
    command = ['git', '-C', str(folder), 'describe', '--always', '--dirty', '--abbrev=12']
    command += ['--exclude=*']
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return None
    text = found.stdout.strip()
    return text.replace('-dirty', ', with changes that are in no commit')


def versions() -> str:
    """Of this package and of those that train."""
    found = {'acmix_mm': __version__, 'Python': sys.version.split()[0]}
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            try:
                found.setdefault(name, version(distribution))
            except PackageNotFoundError:
                continue
    return ', '.join(f'{name} {number}' for name, number in found.items())


def device() -> str:
    """What trained, and in how many processes."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f'CPU, threads: {torch.get_num_threads()}'
    count = get_world_size()
    return name if count == 1 else f'{count} processes, each {name}'


def data(runner: Runner) -> str:
    """Images and classes."""
    dataset = runner.train_dataloader.dataset
    parts = [f'{len(dataset)} images to train']
    if runner.val_loop is not None:
        parts.append(f'{len(runner.val_dataloader.dataset)} to validate')
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes:
        parts.append(f'{len(classes)} classes')
    return ', '.join(parts)


def length(runner: Runner) -> str:
    """Epochs or iterations, and how many images each takes."""
    size = getattr(runner.train_dataloader.batch_sampler, 'batch_size', None)
    size = '' if size is None else f' of {size * get_world_size()} images'
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        count = len(runner.train_dataloader)
        return f'{runner.epoch} epochs of {count} iterations{size}'
    return f'{runner.iter} iterations{size}'


def moment(runner: Runner, validation: dict) -> str:
    """When a validation was."""
    if isinstance(runner.train_loop, EpochBasedTrainLoop):
        return f'epoch {validation["epoch"]}'
    return f'iteration {validation["iter"]}'


def saving_of(runner: Runner) -> CheckpointHook | None:
    """The hook that saves checkpoints, None if there is none."""
    return next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)


def best_of(runner: Runner, validations: list[dict]) -> dict | None:
    """The validation by which the best checkpoint was chosen, None if none was."""
    saving = saving_of(runner)
    if saving is None or not saving.save_best:
        return None
    name = saving.key_indicators[0]
    best = None
    for row in validations:
        value = row['metrics'].get(name)
        if value is not None and (
            best is None or saving.is_better_than[name](value, best['metrics'][name])
        ):
            best = row
    return best


def checkpoints_of(runner: Runner) -> dict[str, str]:
    """The best ones by what they are the best of, and the last one."""
    saving = saving_of(runner)
    found = {}
    if saving is not None and saving.save_best:
        if len(saving.key_indicators) == 1:
            paths = {saving.key_indicators[0]: saving.best_ckpt_path}
        else:
            paths = saving.best_ckpt_path_dict
        found = {f'best {name}': path for name, path in paths.items() if path}
    if saving is not None and saving.last_ckpt:
        found['last checkpoint'] = saving.last_ckpt
    return found or {'checkpoint': 'none was saved'}


# The picture.


def draw(runner: Runner, validations: list[dict]):
    """Losses, metrics and learning rate, each over iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout='constrained')
    losses, metrics, rates = figure.subplots(1, 3)
    history = {
        name.removeprefix('train/'): buffer.data[0]
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('train/')
    }
    parts = [name for name in history if 'loss' in name and name != 'loss']
    for name in [*parts[:LOSSES], *(['loss'] if 'loss' in history else [])]:
        values = np.asarray(history[name], float)
        whole = name == 'loss'
        x = runner.iter - len(values) + 1 + np.arange(len(values))
        if whole:
            losses.plot(x, values, color='black', alpha=0.15, linewidth=0.8)
        losses.plot(
            x, smoothed(values), label=name, linewidth=2 if whole else 1,
            color='black' if whole else None,
        )  # fmt: skip
    losses.set_title('losses, smoothed')
    finite = [v for line in losses.lines for v in line.get_ydata() if 0 < v < math.inf]
    if finite and max(finite) > 20 * min(finite):
        losses.set_yscale('log')
    for name in measured(validations):
        rows = [row for row in validations if name in row['metrics']]
        metrics.plot(
            [row['iter'] for row in rows],
            [row['metrics'][name] for row in rows],
            marker='o', markersize=3, label=name, clip_on=False,
        )  # fmt: skip
    metrics.set_title('metrics of validations' if validations else 'no validation')
    for name in (n for n in ('lr', 'base_lr') if n in history):
        values = history[name]
        rates.plot(runner.iter - len(values) + 1 + np.arange(len(values)), values, label=name)
        break
    rates.set_title('learning rate')
    for axes in (metrics, rates):
        if all(np.min(line.get_ydata()) >= 0 for line in axes.lines):
            axes.set_ylim(bottom=0)
    for axes in (losses, metrics, rates):
        axes.set_xlabel('iteration')
        axes.set_xlim(0, max(runner.iter, 1))
        axes.grid(alpha=0.3)
        if axes.lines and axes is not rates:
            axes.legend(fontsize=7)
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a fiftieth of all values, fewer at the ends; what is not finite is left out."""
    width = max(1, len(values) // 50)
    finite = np.isfinite(values)
    sums, counts = (
        np.convolve(v, np.ones(2 * width - 1), mode='same')
        for v in (np.where(finite, values, 0), finite.astype(float))
    )
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
