"""Configs trained alike, with several seeds each, to compare their accuracy and cost.

:func:`compare` does all of it; :mod:`.comparison_report` makes tables and plots of what it returns.
Every run is a process of its own that trains and evaluates as tools/train.py and tools/test.py do.
"""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.config import Config
from tqdm import tqdm

from ..command_line import WORK_DIRS, keep_freed_memory
from ..config_check import checked_config, setting
from ..data_check import check_data
from ..engine import newest_checkpoint
from ..files import write_whole
from ..runs import evaluate, evaluators_of, train
from ..schedules import set_length
from ..weights import check_starts, resolve_weights
from .measuring import Candidate, measure, note_failure
from .networks import build_trained, complexity
from .report import quartiles
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
NEEDS = ('model', 'train_cfg', 'train_dataloader', 'val_dataloader', 'val_evaluator')
METRICS = ('coco/bbox_mAP_50', 'coco/bbox_mAP')
RATE = 'optim_wrapper.optimizer.lr'
SEARCH_SEED = 1000  # few comparisons have so many seeds
ROUNDS, WARMUP = 11, 2  # of timing
CONFIG_FILE, LOG_FILE, METRICS_FILE = 'config.py', 'log.txt', 'metrics.json'
DIVERGED_FILE, EVALUATION = 'diverged.txt', 'evaluation'


@dataclass(frozen=True, eq=False)
class Recipe:
    """A config as it is trained, whatever the seed.

    Args:
        label (str): What to call it.
        file (str): The config file that it comes from.
        cfg (Config): What is trained.
        work_dir (Path): Holds the folders of recipes.
        factor (float): Its learning rate by that of the file. Default: 1.0.
    """

    label: str
    file: str
    cfg: Config
    work_dir: Path
    factor: float = 1.0

    def __str__(self) -> str:
        return self.label if self.factor == 1 else f'{self.label} at {self.factor:g}x the rate'

    @functools.cached_property
    def text(self) -> str:
        """The config as a file."""
        return self.cfg.pretty_text

    @functools.cached_property
    def folder(self) -> Path:
        """Holds the runs; its name stands for the text."""
        key = hashlib.sha256(self.text.encode()).hexdigest()[:8]
        return self.work_dir / f'{Path(self.file).stem}-{key}'

    @property
    def config(self) -> str:
        """The file with the config that is trained."""
        return str(self.folder / CONFIG_FILE)

    @property
    def rate(self) -> float | None:
        """The learning rate, None where there is not just one."""
        return setting(self.cfg, RATE)


@dataclass(frozen=True)
class Run:
    """A recipe trained with one seed; files in its folder say what came of it."""

    recipe: Recipe
    seed: int

    def __str__(self) -> str:
        return f'{self.recipe}, seed {self.seed}'

    @property
    def folder(self) -> Path:
        return self.recipe.folder / f'seed{self.seed}'

    @property
    def log(self) -> Path:
        return self.folder / LOG_FILE

    @property
    def metrics(self) -> dict[str, float] | None:
        """What the evaluation gave, None if the run has not come so far."""
        file = self.folder / METRICS_FILE
        return json.loads(file.read_text()) if file.exists() else None

    @property
    def divergence(self) -> str | None:
        """At which loss training stopped that was not finite, None if it has not."""
        file = self.folder / DIVERGED_FILE
        return file.read_text() if file.exists() else None

    @property
    def finished(self) -> bool:
        """Whether it need not be trained any more; training that diverged would do so again."""
        return self.metrics is not None or self.divergence is not None

    def value(self, metric: str) -> float | None:
        """A result of the evaluation, None if there is none, or none that is finite."""
        value = (self.metrics or {}).get(metric, math.nan)
        return value if math.isfinite(value) else None


@dataclass(eq=False)
class System:
    """One of the configs that are compared, and what came of it.

    Args:
        label (str): What to call it.
        file (str): The config file.
        candidates (dict[float, Recipe]): What may be trained with every seed, by the factors of
            the learning rate, from small to large.
        search (list[Run]): Of the same factors, to choose among them; empty where there is but one.
        recipe (Recipe | None): What is trained with every seed. None if the search found no rate.
        costs (dict): Of its model, as far as they were measured; see :func:`measure_costs`.
    """

    label: str
    file: str
    candidates: dict[float, Recipe]
    search: list[Run] = field(default_factory=list)
    recipe: Recipe | None = None
    costs: dict = field(default_factory=dict)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate may lie outside of those searched."""
        if not self.search or self.recipe is None:
            return False
        return self.recipe.factor in (min(self.candidates), max(self.candidates))

    def decide(self, metric: str) -> None:
        """Choose the recipe by this metric, if the search is finished."""
        if not self.search:
            (self.recipe,) = self.candidates.values()
        elif all(run.finished for run in self.search):
            results = {run.recipe.factor: run.value(metric) for run in self.search}
            self.recipe = self.candidates.get(best_factor(results))

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """Its runs with these seeds, as far as it is known what to train."""
        return [] if self.recipe is None else [Run(self.recipe, seed) for seed in seeds]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Args:
        systems (list[System]): In the order of the configs; the first is what the others are
            compared with.
        seeds (tuple[int, ...]): Those of the comparison.
        metrics (tuple[str, ...]): Names of the results that are compared.
        device (str): Where costs were measured.
        threads (int): CPU threads of that measurement.
        failures (list[str]): A line for everything that went wrong.
    """

    systems: list[System]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]
    device: str
    threads: int
    failures: list[str] = field(default_factory=list)

    def finished(self, system: System) -> list[Run]:
        """The runs of a system, with the comparison's seeds, that have all the metrics."""
        return [run for run in system.runs(self.seeds) if trouble(run, self.metrics) is None]


def compare(
    configs: Sequence[str],
    *,
    labels: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    max_epochs: int | None = None,
    options: dict[str, object] | None = None,
    metrics: Sequence[str] = METRICS,
    rate_factors: Sequence[float] = (),
    search_epochs: int | None = None,
    search_seed: int = SEARCH_SEED,
    jobs: int = 1,
    threads: int | None = None,
    work_dir: str | Path = Path(WORK_DIRS, 'compare'),
) -> Comparison:
    """Train every config with every seed for the same budget, evaluate them, measure their costs.

    Runs are kept in ``WORK_DIR/CONFIG-KEY/seedN``, where KEY stands for the text of the config as
    it is trained. The same call again repeats no finished run and goes on with interrupted ones.
    Changes of data or of code are not noticed: remove the folder then. Progress is printed.

    Processes are spawned: a script that calls it needs ``if __name__ == '__main__':``.

    Args:
        configs (Sequence[str]): Config files, which must agree in epochs, batch size and data.
        labels (Sequence[str] | None): What to call them. Default: None, the names of the files.
        seeds (Sequence[int]): Of the runs. Default: (0, 1, 2).
        max_epochs (int | None): Epochs to train; schedules that count epochs are scaled in
            proportion. Default: None, those of the configs.
        options (dict[str, object] | None): Settings of all configs, by dotted names. Default: None.
        metrics (Sequence[str]): Results of the evaluation; the larger, the better. Default: box AP
            at IoU 0.5, and box AP.
        rate_factors (Sequence[float]): At least two factors of every config's own learning rate
            (``optim_wrapper.optimizer.lr``), among which the best by the first metric is taken for
            all seeds. Default: none, the config's own.
        search_epochs (int | None): Epochs of that search. Default: None, ``max_epochs``.
        search_seed (int): Its seed, none of ``seeds``. Default: 1000.
        jobs (int): Runs at a time; each gets its share of the threads. Default: 1.
        threads (int | None): CPU threads, of all runs together and for the measurement of time.
            Default: None, torch's.
        work_dir (str | Path): Where runs are kept. Default: 'work_dirs/compare'.

    Raises:
        ValueError: Before anything is written, if an argument, a config, what it starts from or its
            data cannot serve. A run that fails later is one of ``Comparison.failures``.
    """
    configs, seeds, metrics = list(map(str, configs)), tuple(seeds), tuple(metrics)
    labels = [Path(file).stem for file in configs] if labels is None else list(labels)
    threads = torch.get_num_threads() if threads is None else threads
    factors = sorted(rate_factors)
    check_arguments(configs, labels, seeds, metrics, jobs, threads)
    check_search(factors, search_epochs, search_seed, seeds)
    base = {file: checked_config(file, options, NEEDS) for file in configs}
    systems = [
        make_system(label, file, cfg, Path(work_dir), max_epochs, factors, search_epochs,
                    search_seed)
        for label, (file, cfg) in zip(labels, base.items(), strict=True)
    ]  # fmt: skip
    check_alike(systems)
    check_metrics(systems, metrics)
    for system in systems:
        system.decide(metrics[0])
    check_beginnings(
        system for system in systems
        if not all(run.finished for run in [*system.search, *system.runs(seeds)])
    )  # fmt: skip

    problems = {}
    search = [run for runs in zip(*(s.search for s in systems), strict=True) for run in runs]
    if search:
        print('search of learning rates:', end=' ')
        problems = train_all(search, metrics[:1], jobs, threads // jobs)
        problems = {run: text for run, text in problems.items() if not run.finished}
        for system in systems:
            system.decide(metrics[0])
            print(f'{system.label}: {describe_search(system, metrics[0])}', flush=True)
    runs = [run for seed in seeds for system in systems for run in system.runs([seed])]
    problems |= train_all(runs, metrics, jobs, threads // jobs)
    failures = [f'{run}: {problem} (log: {run.log})' for run, problem in problems.items()]
    failures += [
        f'{system.label}: none of the learning rates gave {metrics[0]}'
        for system in systems
        if system.recipe is None and all(run.finished for run in system.search)
    ]
    device = 'cuda' if torch.cuda.is_available() else 'cpu'  # as training chooses
    comparison = Comparison(systems, seeds, metrics, device, threads, failures)
    comparison.failures.extend(measure_costs(comparison))
    return comparison


# Arguments.


def check_arguments(
    configs: list[str],
    labels: list[str],
    seeds: Sequence[int],
    metrics: Sequence[str],
    jobs: int,
    threads: int,
) -> None:
    """Raises a ValueError unless a comparison can be of these; see :func:`compare`."""
    if len(labels) != len(configs):
        raise ValueError(
            f'labels must be one for each of {len(configs)} configs, got {len(labels)}'
        )
    paths = [Path(file).resolve() for file in configs]
    for name, values, shown in (
        ('configs', paths, configs),
        ('labels', labels, labels),
        ('seeds', seeds, seeds),
        ('metrics', metrics, metrics),
    ):
        if not values:
            raise ValueError(f'{name} must be at least one, got none')
        for index, value in enumerate(values):
            if value in values[:index]:
                raise ValueError(f'{name} must differ, got {shown[index]} twice')
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f'seeds must be from 0 to 2^32 - 1, got {", ".join(map(str, seeds))}')
    if not 0 < jobs <= threads:
        raise ValueError(f'jobs must be from 1 to the number of threads, {threads}, got {jobs}')


def check_search(
    factors: Sequence[float], epochs: int | None, seed: int, seeds: Sequence[int]
) -> None:
    """Raises a ValueError unless learning rates can be searched so; see :func:`compare`."""
    if not factors:
        if epochs is not None:
            raise ValueError(f'search_epochs goes with rate_factors, got {epochs} without them')
        return
    shown = ', '.join(f'{factor:g}' for factor in factors)
    if not all(0 < factor < math.inf for factor in factors):
        raise ValueError(f'rate_factors must be above 0, got {shown}')
    if len(set(factors)) < max(len(factors), 2):
        raise ValueError(f'rate_factors must be at least two that differ, got {shown}')
    if seed in seeds:
        raise ValueError(f'search_seed must be none of the seeds, got {seed}')


# Configs.


def make_system(
    label: str,
    file: str,
    cfg: Config,
    work_dir: Path,
    max_epochs: int | None,
    factors: Sequence[float],
    search_epochs: int | None,
    search_seed: int,
) -> System:
    """A config with all that may be trained of it; see :func:`compare`."""

    def recipe(factor: float, epochs: int | None, argument: str) -> Recipe:
        return Recipe(label, file, prepare(cfg, file, factor, epochs, argument), work_dir, factor)

    candidates = {f: recipe(f, max_epochs, 'max_epochs') for f in factors or [1.0]}
    search = [] if not factors else list(candidates.values())
    if search_epochs is not None:
        search = [recipe(factor, search_epochs, 'search_epochs') for factor in factors]
    return System(label, file, candidates, [Run(recipe, search_seed) for recipe in search])


def prepare(
    cfg: Config, file: str, factor: float = 1.0, epochs: int | None = None, argument: str = 'epochs'
) -> Config:
    """The config to train: its test data are its validation data, and nothing else is evaluated.

    Args:
        cfg (Config): That of the file, which stays as it is.
        file (str): Its name, for messages.
        factor (float): Of the learning rate. Default: 1.0.
        epochs (int | None): To train. Default: None, the config's.
        argument (str): Where they come from, for messages. Default: 'epochs'.

    Raises:
        ValueError: If the config has no such epochs, or not just one learning rate.
    """
    cfg = copy.deepcopy(cfg)
    if epochs is not None:
        # Warm-ups as they are: short runs are for comparison with each other.
        set_length(cfg, epochs, 'epochs', file, argument, warmup=False)
    if factor != 1:
        if setting(cfg, RATE) is None:
            raise ValueError(f'rate_factors: {file} has no {RATE}')
        cfg.optim_wrapper.optimizer.lr *= factor
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_cfg = {'type': 'TestLoop'}
    return cfg


def check_alike(systems: list[System]) -> None:
    """Raises a ValueError unless all train for the same budget, and no two are the same."""
    recipes = [recipe for system in systems for recipe in system.candidates.values()]
    for index, recipe in enumerate(recipes):
        for other in recipes[:index]:
            if other.folder == recipe.folder:
                raise ValueError(
                    f'configs must differ, {other.file} and {recipe.file} are the same'
                )
    first = recipes[0]
    for recipe in recipes[1:]:
        for key in BUDGET:
            values = setting(first.cfg, key), setting(recipe.cfg, key)
            if values[0] != values[1]:
                raise ValueError(
                    f'configs must have one budget, but {key} is {values[0]!r} in {first.file} '
                    f'and {values[1]!r} in {recipe.file}; max_epochs or options make them equal'
                )


def check_metrics(systems: list[System], metrics: Sequence[str]) -> None:
    """Raises a ValueError if an evaluator is known not to produce a metric."""
    for system in systems:
        cfg = next(iter(system.candidates.values())).cfg
        produced = set()
        for evaluator in evaluators_of(cfg):
            names = metric_names(evaluator)
            if names is None:
                return
            produced |= names
        for metric in metrics:
            if metric not in produced:
                raise ValueError(
                    f'metrics: {system.file} produces {", ".join(sorted(produced))}, got {metric}'
                )


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


def check_beginnings(systems: Iterable[System]) -> None:
    """Raises a ValueError if a system cannot start as its config says, or not on its data."""
    looked_at = set()
    for system in systems:
        # A copy: a file in the place of a URL makes no other runs of it.
        cfg = copy.deepcopy(next(iter(system.candidates.values())).cfg)
        resolve_weights(cfg)
        check_starts(cfg)
        data = str([cfg.train_dataloader.dataset, cfg.val_dataloader.dataset, cfg.val_evaluator])
        if data not in looked_at:
            check_data(cfg, ['train', 'val'])
        looked_at.add(data)


# The search.


def best_factor(results: Mapping[float, float | None]) -> float | None:
    """The factor of the learning rate that gave the best result.

    Args:
        results (Mapping[float, float | None]): The results by factor, None where there is none, as
            where training diverged.

    Returns:
        float | None: Of equally good ones the factor nearest to 1, and of two as near the smaller
        one; None if there are no results.
    """
    found = [(value, factor) for factor, value in results.items() if value is not None]
    if not found:
        return None
    return max(found, key=lambda pair: (pair[0], -abs(math.log(pair[1])), -pair[1]))[1]


def describe_search(system: System, metric: str) -> str:
    """What the search has given and what was chosen, in a line."""
    results = ', '.join(f'{r.recipe.rate:.3g} {outcome(r, metric)}' for r in system.search)
    if system.recipe is None:
        return f'no learning rate ({results})'
    edge = ' at the edge of the search' if system.at_edge else ''
    return f'learning rate {system.recipe.rate:.3g}{edge} ({results})'


# Training.


def train_and_evaluate(config: str, seed: int, folder: Path, threads: int) -> None:
    """One run, in a process of its own; all that it says goes into its log."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(threads)
    cfg = Config.fromfile(config)
    cfg.randomness = {**cfg.get('randomness', {}), 'seed': seed}
    cfg.work_dir = str(folder)
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    saving.pop('out_dir', None)  # by seeds alone, runs of several configs would meet there
    training = copy.deepcopy(cfg)
    training.resume = 'auto'
    # Evaluated below, not as part of training, which may have been interrupted just before.
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        training[key] = None
    try:
        train(training)
    except FloatingPointError as error:
        write(folder / DIVERGED_FILE, str(error))
        return
    cfg.work_dir = str(folder / EVALUATION)
    metrics = evaluate(cfg, checkpoint_of(folder))
    write(folder / METRICS_FILE, json.dumps(metrics, indent=1, default=float))


def checkpoint_of(folder: Path) -> str:
    """The newest checkpoint of a run; raises a FileNotFoundError if there is none."""
    file = newest_checkpoint(folder)
    if file is None:
        raise FileNotFoundError(f'{folder} has no checkpoint')
    return file


def write(file: Path, content: str) -> None:
    """Write a text file, whole or not at all, and make its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, content)


def train_all(runs: list[Run], metrics: Sequence[str], jobs: int, threads: int) -> dict[Run, str]:
    """Finish the runs, ``jobs`` at a time with ``threads`` each; what is wrong, by run."""
    context = multiprocessing.get_context('spawn')
    for recipe in {run.recipe for run in runs}:
        write(Path(recipe.config), recipe.text)
    waiting = [run for run in runs if not run.finished]
    running: dict[Run, tuple[multiprocessing.Process, float]] = {}
    problems = {run: trouble(run, metrics) for run in runs if run not in waiting}
    seconds: list[float] = []
    begin = time.monotonic()
    print(f'{len(runs)} runs, {len(problems)} of them finished before', flush=True)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                arguments = (run.recipe.config, run.seed, run.folder, threads)
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
                problems[run] = failure(run, code) if code else trouble(run, metrics)
                times = [duration(now - start), f'{duration(now - begin)} so far']
                if seconds and (waiting or running):
                    mean = statistics.mean(seconds)
                    done = sum(min(now - start, mean) for _, start in running.values())
                    left = (mean * (len(waiting) + len(running)) - done) / jobs
                    times.append(f'about {duration(left)} to go')
                values = (f'{metric} {outcome(run, metric)}' for metric in metrics)
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
    """How a process ended that was to train."""
    lines = run.log.read_text(errors='replace').splitlines() if run.log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), 'it said nothing')
    return f'exit code {code}: {last}'


def outcome(run: Run, metric: str) -> str:
    """A run's result for tables, or in a word why there is none."""
    value = run.value(metric)
    if value is not None:
        return f'{value:.3f}'
    if run.divergence is not None:
        return 'diverged'
    return 'failed' if run.metrics is None else 'no result'


def trouble(run: Run, metrics: Sequence[str]) -> str | None:
    """Why a run does not have these metrics, None if it has."""
    if run.divergence is not None:
        return f'diverged: {run.divergence}'
    if run.metrics is None:
        return 'not finished'
    names = [metric for metric in metrics if run.value(metric) is None]
    given = ', '.join(run.metrics) or 'no results, as where nothing is predicted'
    return f'no {", ".join(names)}: the evaluation gave {given}' if names else None


def duration(seconds: float) -> str:
    return f'{seconds / 60:.1f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


# Costs.


def measure_costs(comparison: Comparison) -> list[str]:
    """Measure what the systems' models cost, each by its first finished run; what went wrong.

    ``System.costs`` gets what :func:`.networks.complexity` gives, and medians of 'forward' and
    'train' in seconds an image. What could not be measured is left out. This process measures: it
    keeps memory that it frees (:func:`~acmix_mm.command_line.keep_freed_memory`).
    """
    problems: list[str] = []
    candidates: dict[str, list[Candidate]] = {'forward': [], 'train': []}
    systems = {s.label: s for s in comparison.systems if comparison.finished(s)}
    threads = torch.get_num_threads()
    torch.set_num_threads(comparison.threads)
    keep_freed_memory()
    with contextlib.redirect_stdout(io.StringIO()):  # COCO's API talks
        for label, system in systems.items():
            row = {'candidate': label}
            with note_failure(row):
                run = comparison.finished(system)[0]
                files = (run.recipe.config, checkpoint_of(run.folder))
                system.costs = complexity(*files, comparison.device)
                for mode, group in candidates.items():
                    case = Case(system.costs['image'], mode == 'train', device=comparison.device)
                    group.append(Candidate(label, build_trained, files, case))
            if 'error' in row:
                problems.append(f'{label}, costs: {row["error"]}')
        for mode, row in _measured(candidates):
            system = systems[row['candidate']]
            if 'error' in row:
                problems.append(f'{system.label}, {mode}: {row["error"]}')
            else:
                loader = system.recipe.cfg.train_dataloader
                images = loader.batch_size if mode == 'train' else 1
                system.costs[mode] = quartiles(row['times'])[1] / images
    torch.set_num_threads(threads)
    return problems


def _measured(candidates: dict[str, list[Candidate]]) -> Iterator[tuple[str, dict]]:
    """Modes and rows of :func:`.measuring.measure`, with a progress bar."""
    candidates = {mode: group for mode, group in candidates.items() if group}
    with tqdm(total=sum(ROUNDS + len(c) for c in candidates.values()), leave=False) as bar:

        def advance(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        for mode, group in candidates.items():
            for row in measure(group, ROUNDS, WARMUP, memory=False, advance=advance):
                yield mode, row
