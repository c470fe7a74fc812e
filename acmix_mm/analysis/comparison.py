"""Configs trained alike, with several seeds each, and their accuracy compared with their cost."""

import argparse
import copy
import csv
import datetime
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tqdm import tqdm

from ..command_line import check_folder, keep_freed_memory, load_config
from ..config_check import setting
from ..engine import newest_checkpoint, protect
from ..files import claim, write_figure, write_whole
from ..weights import check_starts, resolve_weights
from .measuring import Candidate, device_name, measure, note_failure
from .networks import build_trained, complexity
from .report import quartiles, shape_name
from .steps import Case

# What must be equal for runs to be of one budget.
BUDGET = (
    'train_cfg.max_epochs',
    'train_cfg.max_iters',
    'train_dataloader.batch_size',
    'train_dataloader.dataset.data_root',
    'train_dataloader.dataset.ann_file',
    'train_dataloader.dataset.indices',
    'val_dataloader.dataset.data_root',
    'val_dataloader.dataset.ann_file',
)
ROUNDS, WARMUP = 11, 2  # of timing
CONFIG_FILE, LOG_FILE, METRICS_FILE = 'config.py', 'log.txt', 'metrics.json'


@dataclass(frozen=True, eq=False)
class Model:
    """A config to compare; ``folder`` holds its runs."""

    label: str
    file: str
    cfg: Config
    folder: Path

    @property
    def config(self) -> str:
        """The file with the config that is trained."""
        return str(self.folder / CONFIG_FILE)


@dataclass(frozen=True)
class Run:
    """A model trained with one seed."""

    model: Model
    seed: int

    def __str__(self) -> str:
        return f'{self.model.label}, seed {self.seed}'

    @property
    def folder(self) -> Path:
        return self.model.folder / f'seed{self.seed}'

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE

    def metrics(self) -> dict[str, float] | None:
        """What the evaluation gave, None if the run is not finished."""
        file = self.folder / METRICS_FILE
        return json.loads(file.read_text()) if file.exists() else None


# Configs.


def set_epochs(cfg: Config, epochs: int, file: str) -> None:
    """Train for so many epochs; schedules that count epochs shrink or grow in proportion."""
    loop = cfg.train_cfg
    if 'max_epochs' not in loop:
        sys.exit(f'error: --max-epochs: {file} counts iterations (train_cfg.max_iters)')

    def scaled(value: float) -> int:
        return round(value * epochs / loop.max_epochs)

    schedulers = cfg.get('param_scheduler') or []
    for scheduler in [schedulers] if isinstance(schedulers, dict) else schedulers:
        if scheduler.get('by_epoch', True):
            for key in ('begin', 'end', 'T_max', 'step_size'):
                if key in scheduler:
                    scheduler[key] = scaled(scheduler[key])
            if 'milestones' in scheduler:
                scheduler.milestones = [scaled(epoch) for epoch in scheduler.milestones]
            if scheduler.get('end', math.inf) <= scheduler.get('begin', 0):
                sys.exit(
                    f'error: --max-epochs {epochs}: nothing is left of {scheduler.type} in {file}, '
                    f'whose schedule is for {loop.max_epochs} epochs'
                )
    loop.max_epochs = epochs


def prepare(file: str, options: dict | None, epochs: int | None) -> Config:
    """The config to train: its test data are its validation data, and nothing else is evaluated."""
    needs = ('model', 'train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator')
    cfg = load_config(file, options, needs)
    if epochs is not None:
        set_epochs(cfg, epochs, file)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_cfg = {'type': 'TestLoop'}
    return cfg


def check_budget(configs: dict[str, Config]) -> None:
    """Exits with a message unless all configs, by their files, train for the same."""
    (first, reference), *others = configs.items()
    for file, cfg in others:
        for key in BUDGET:
            values = setting(reference, key), setting(cfg, key)
            if values[0] != values[1]:
                sys.exit(
                    f'error: configs must have one budget, but {key} is {values[0]!r} in {first} '
                    f'and {values[1]!r} in {file}; --max-epochs or --cfg-options make them equal'
                )


def check_data(configs: dict[str, Config]) -> None:
    for file, cfg in configs.items():
        for loader in ('train_dataloader', 'val_dataloader'):
            root = setting(cfg, f'{loader}.dataset.data_root')
            if root and not Path(root).is_dir():
                sys.exit(f'error: {loader}.dataset.data_root of config {file} is {root}, no folder')


def check_metrics(configs: dict[str, Config], metrics: list[str]) -> None:
    """Exits with a message if an evaluator is known not to produce a metric."""
    for file, cfg in configs.items():
        evaluators = cfg.val_evaluator
        produced = set()
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            names = metric_names(evaluator)
            if names is None:
                return
            produced |= names
        for metric in metrics:
            if metric not in produced:
                sys.exit(f'error: --metric {metric}: {file} produces {", ".join(sorted(produced))}')


def metric_names(evaluator: dict) -> set[str] | None:
    """Names of an evaluator's results, as far as they are known without running it."""
    kinds = evaluator.get({'CocoMetric': 'metric', 'IoUMetric': 'iou_metrics'}.get(evaluator.type))
    kinds = {kinds} if isinstance(kinds, str) else set(kinds or ())
    if {'prefix', 'metric_items'} & evaluator.keys() or not kinds:
        return None
    if kinds == {'mIoU'}:
        return {'aAcc', 'mIoU', 'mAcc'}
    if kinds <= {'bbox', 'segm'}:
        items = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
        return {f'coco/{kind}_{item}' for kind in kinds for item in items}
    return None


# Training.


def check_all_starts(models: list[Model]) -> None:
    """Exits with a message if a model cannot start from the checkpoint that its config names."""
    for model in models:
        cfg = copy.deepcopy(model.cfg)  # a file in the place of a URL makes no other runs of it
        resolve_weights(cfg)
        check_starts(cfg)


def train_and_evaluate(config: str, seed: int, folder: Path, threads: int) -> None:
    """One run, in a process of its own; all that it says goes into its log."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(threads)
    keep_freed_memory()
    cfg = Config.fromfile(config)
    resolve_weights(cfg)
    # Evaluated below, not as part of training, which may have been interrupted just before.
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg[key] = None
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
    cfg.work_dir = str(folder)
    lock = claim(folder)
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, checkpoint
    protect(cfg)
    runner = Runner.from_cfg(cfg)
    runner.train()
    write(folder / METRICS_FILE, json.dumps(runner.test(), indent=1, default=float))
    lock.close()


def write(file: Path, content: str) -> None:
    """Write a text file, whole or not at all, and make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)


def train_all(runs: list[Run], metrics: list[str], jobs: int, threads: int) -> dict[Run, str]:
    """Finish the runs, ``jobs`` at a time with ``threads`` each; what went wrong, by run."""
    context = multiprocessing.get_context('spawn')
    waiting = [run for run in runs if run.metrics() is None]
    running: dict[Run, tuple[multiprocessing.Process, float]] = {}
    problems = {run: missing(run, metrics) for run in runs if run not in waiting}
    seconds: list[float] = []
    begin = time.monotonic()
    print(f'{len(runs)} runs, {len(problems)} of them finished before', flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                arguments = (run.model.config, run.seed, run.folder, threads)
                process = context.Process(target=train_and_evaluate, args=arguments)
                process.start()
                running[run] = (process, time.monotonic())
            multiprocessing.connection.wait([process.sentinel for process, _ in running.values()])
            for run, (process, start) in list(running.items()):
                if process.is_alive():
                    continue
                del running[run]
                now = time.monotonic()
                code = process.exitcode
                if not code:
                    seconds.append(now - start)
                problems[run] = failure(run, code) if code else missing(run, metrics)
                values = (f'{m} {run.metrics()[m]:.3f}' for m in metrics)
                times = [duration(now - start), f'{duration(now - begin)} so far']
                if seconds and (waiting or running):
                    mean = statistics.mean(seconds)
                    done = sum(min(now - start, mean) for _, start in running.values())
                    left = (mean * (len(waiting) + len(running)) - done) / jobs
                    times.append(f'about {duration(left)} to go')
                print(
                    f'[{len(problems)}/{len(runs)}] {run}: {problems[run] or ", ".join(values)} '
                    f'({", ".join(times)})',
                    flush=True,
                )
    finally:  # interrupted: leave no process behind
        for process, _ in running.values():
            process.terminate()
            process.join()
    return {run: problem for run, problem in problems.items() if problem}


def failure(run: Run, code: int) -> str:
    lines = run.log.read_text(errors='replace').splitlines() if run.log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), 'it said nothing')
    return f'exit code {code}: {last}'


def missing(run: Run, metrics: list[str]) -> str | None:
    produced = run.metrics()
    names = [metric for metric in metrics if metric not in produced]
    given = ', '.join(produced) or 'no results, as where nothing is predicted'
    return f'no {", ".join(names)}: the evaluation gave {given}' if names else None


def duration(seconds: float) -> str:
    return f'{seconds / 60:.1f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


# Costs.


def measure_costs(runs: list[Run], device: str) -> tuple[dict[Model, dict], list[str]]:
    """What the models of these runs cost, one run a model, and what went wrong.

    Costs are those of :func:`.networks.complexity`, and medians of 'forward' and 'train' in
    seconds an image. What could not be measured is left out.
    """
    costs: dict[Model, dict] = {run.model: {} for run in runs}
    problems: list[str] = []
    candidates: dict[str, list[Candidate]] = {'forward': [], 'train': []}
    for run in runs:
        row = {'candidate': run.model.label}
        with note_failure(row):
            files = (run.model.config, newest_checkpoint(run.folder))
            if files[1] is None:
                raise FileNotFoundError(f'{run.folder} has no checkpoint')
            costs[run.model] = complexity(*files, device)
            for mode, group in candidates.items():
                case = Case(costs[run.model]['image'], mode == 'train', device=device)
                group.append(Candidate(run.model.label, build_trained, files, case))
        if 'error' in row:
            problems.append(f'{run.model.label}, costs: {row["error"]}')
    models = {model.label: model for model in costs}
    with tqdm(total=sum(ROUNDS + len(c) for c in candidates.values()), leave=False) as bar:

        def advance(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        for mode, group in candidates.items():
            for row in measure(group, ROUNDS, WARMUP, memory=False, advance=advance):
                model = models[row['candidate']]
                if 'error' in row:
                    problems.append(f'{model.label}, {mode}: {row["error"]}')
                else:
                    images = model.cfg.train_dataloader.batch_size if mode == 'train' else 1
                    costs[model][mode] = quartiles(row['times'])[1] / images
    return costs, problems


# Results.


def check_results(out: Path) -> None:
    """Exits with a message unless the results can be written, hours later; makes their folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    check_folder(out.parent)
    for file in (Path(f'{out}.{suffix}') for suffix in ('csv', 'md', 'png')):
        if file.is_dir():
            sys.exit(f'error: --out {out}: {file} is a folder')


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation of a sample; one value has no deviation."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def table(
    runs: list[Run], costs: dict[Model, dict], args: argparse.Namespace
) -> tuple[list[str], list[list[str]]]:
    """Header, and a line of cells for each model; its label is the first of them."""
    header = ['model', 'backbone parameters', 'parameters', 'GFLOPs', 'forward, ms', 'train, ms']
    rows = []
    for model, cost in costs.items():
        row = [model.label]
        row += [f'{cost[key]:,}' if cost else '' for key in ('backbone_parameters', 'parameters')]
        row.append(f'{cost["flops"] / 1e9:.3g}' if cost else '')
        row += [f'{1e3 * cost[mode]:.1f}' if mode in cost else '' for mode in ('forward', 'train')]
        for metric in args.metric:
            values = {run.seed: run.metrics()[metric] for run in runs if run.model == model}
            mean, deviation = mean_and_deviation(list(values.values()))
            spread = '' if deviation is None else f' ± {deviation:.3f}'
            each = (f'{values[seed]:.3f}' if seed in values else 'failed' for seed in args.seeds)
            row.append(f'{mean:.3f}{spread} ({", ".join(each)})')
        rows.append(row)
    return [*header, *args.metric], rows


def csv_text(runs: list[Run], costs: dict[Model, dict], metrics: list[str]) -> str:
    """A line for each run: its metrics, then what all runs of its model share."""
    shared = ['backbone_parameters', 'parameters', 'image', 'gflops', 'forward_ms', 'train_ms']
    shared += [f'{metric} {what}' for metric in metrics for what in ('mean', 'std')]
    out = io.StringIO()
    writer = csv.DictWriter(
        out, ['model', 'config', 'seed', *metrics, *shared], lineterminator='\n'
    )
    writer.writeheader()
    for run in runs:
        cost = costs[run.model]
        row = {'model': run.model.label, 'config': relative(run.model.file), 'seed': run.seed}
        row |= {metric: run.metrics()[metric] for metric in metrics}
        if cost:
            row |= {key: cost[key] for key in ('backbone_parameters', 'parameters')}
            row |= {'image': shape_name(cost['image']), 'gflops': cost['flops'] / 1e9}
        row |= {f'{m}_ms': 1e3 * cost[m] for m in ('forward', 'train') if m in cost}
        for metric in metrics:
            values = [r.metrics()[metric] for r in runs if r.model == run.model]
            row[f'{metric} mean'], row[f'{metric} std'] = mean_and_deviation(values)
        writer.writerow(row)
    return out.getvalue()


def markdown(
    runs: list[Run], costs: dict[Model, dict], args: argparse.Namespace, command: list[str]
) -> str:
    """The table, with what its figures are and where they come from."""
    header, rows = table(runs, costs, args)
    for row, model in zip(rows, costs, strict=True):
        row[0] = f'[{row[0]}]({os.path.relpath(model.file, args.out.parent)})'
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *rows]
    cfg = runs[0].model.cfg
    budget = ', '.join(f'{k} {v}' for k, v in cfg.train_cfg.items() if k.startswith('max_'))
    seeds = ', '.join(map(str, args.seeds))
    images = ', '.join(sorted({shape_name(cost['image']) for cost in costs.values() if cost}))
    machine = f'{device_name(args.device)}, {args.threads} CPU threads, torch {torch.__version__}'
    return f"""# Comparison

```bash
python tools/analysis_tools/compare.py {' '.join(shlex.quote(relative(a)) for a in command)}
```

{chr(10).join(f'| {" | ".join(line)} |' for line in lines)}

![Accuracy against FLOPs, parameters and time]({args.out.name}.png)

* Accuracy: mean ± standard deviation over runs, and each run, with seeds {seeds}. On the
  validation data, after training with {budget}, batch_size {cfg.train_dataloader.batch_size}.
* FLOPs: multiplications of convolutions, matrix products, attention and aggregation in the
  prediction of one image ({images}).
* Time: of one image, median of {ROUNDS} rounds in turns, {datetime.date.today()},
  {machine}.
  Forward is the prediction of one image; train is forward and backward pass of a batch, by the
  number of its images.
"""


def relative(argument: str) -> str:
    """An argument or KEY=VALUE whose path does not depend on where the working directory is."""
    key, equals, value = argument.rpartition('=')
    return f'{key}{equals}{os.path.relpath(value)}' if os.path.isabs(value) else argument


def plot(runs: list[Run], costs: dict[Model, dict], args: argparse.Namespace) -> None:
    """The first metric, its mean and range over seeds, against the costs."""
    panels = (
        ('flops', 1e-9, 'GFLOPs of a prediction'),
        ('parameters', 1e-6, 'parameters, millions'),
        ('forward', 1e3, 'time of a prediction, ms'),
    )
    metric = args.metric[0]
    figure = matplotlib.figure.Figure(figsize=(13, 4.5), layout='constrained')
    figure.suptitle(
        f'{device_name(args.device)}, {args.threads} threads, torch {torch.__version__}'
    )
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (key, factor, label) in zip(axes, panels, strict=True):
        places = [factor * cost.get(key, math.nan) for cost in costs.values()]
        for index, (model, x) in enumerate(zip(costs, places, strict=True)):
            values = [run.metrics()[metric] for run in runs if run.model == model]
            mean = statistics.mean(values)
            spread = [[mean - min(values)], [max(values) - mean]]
            style = {'color': f'C{index % 10}', 'marker': 'os^Dv'[index // 10 % 5], 'capsize': 3}
            axis.errorbar(x, mean, spread, linestyle='', label=model.label, **style)
        axis.set_xlim(0, 1.1 * max((x for x in places if x > 0), default=1))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f'{metric}: mean and range')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), 4))
    write_figure(f'{args.out}.png', figure, dpi=120)
