"""What a comparison has found: means with intervals, differences, tables, files and a plot."""

import csv
import datetime
import io
import json
import math
import os
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import torch
from scipy.special import stdtrit

from ..environment import device_name
from ..files import write_figure
from .comparison import ROUNDS, Comparison, Run, System, outcome, write
from .report import align, shape_name

CONFIDENCE = 0.95
# What accuracy is plotted against: by its name in System.costs, a unit and what to call it.
COSTS = {
    'flops': (1e9, 'GFLOPs of a prediction'),
    'parameters': (1e6, 'parameters, millions'),
    'forward': (1e-3, 'time of a prediction, ms'),
    'train': (1e-3, 'time of training, ms an image'),
}
DEFAULT_COSTS = ('flops', 'parameters', 'forward')
TOOL = 'tools/analysis_tools/compare.py'


# Statistics.


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % confidence interval.

    Args:
        mean (float): Of a sample.
        margin (float | None): Half of the interval's width; None where there is one value only.
    """

    mean: float
    margin: float | None = None

    @property
    def low(self) -> float | None:
        return None if self.margin is None else self.mean - self.margin

    @property
    def high(self) -> float | None:
        return None if self.margin is None else self.mean + self.margin

    def text(self, sign: str = '') -> str:
        """With three decimals, ``sign`` as in format specifications."""
        margin = '' if self.margin is None else f' ± {self.margin:.3f}'
        return f'{self.mean:{sign}.3f}{margin}'


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of a normal sample and its 95 % confidence interval.

    By Student's t distribution with n - 1 degrees of freedom: mean ± t(0.975) * s / sqrt(n).

    Args:
        values (Sequence[float]): At least one.
    """
    count, mean = len(values), statistics.mean(values)
    if count == 1:
        return Estimate(mean)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(count))


def differences(comparison: Comparison, system: System, metric: str) -> list[float]:
    """A system's results less those of the first system, by the seeds that both have finished."""
    first, own = (
        {run.seed: run.value(metric) for run in comparison.finished(s)}
        for s in (comparison.systems[0], system)
    )
    return [own[seed] - first[seed] for seed in comparison.seeds if seed in own and seed in first]


@dataclass(frozen=True)
class Summary:
    """What a system has got in a metric.

    Args:
        outcomes (list[str]): Of each seed, for tables.
        mean (Estimate): Of the runs that are finished.
        difference (Estimate | None): The mean difference to the first system by seeds; None for the
            first one itself, and where no seed has both.
    """

    outcomes: list[str]
    mean: Estimate
    difference: Estimate | None


def summarise(comparison: Comparison, system: System, metric: str) -> Summary:
    """The summary of a system with finished runs."""
    values = [run.value(metric) for run in comparison.finished(system)]
    pairs = [] if system is comparison.systems[0] else differences(comparison, system, metric)
    return Summary(
        [outcome(run, metric) for run in system.runs(comparison.seeds)],
        estimate(values),
        estimate(pairs) if pairs else None,
    )


# Tables.


def with_results(comparison: Comparison) -> list[System]:
    """The systems of which runs are finished."""
    return [system for system in comparison.systems if comparison.finished(system)]


def table(comparison: Comparison) -> list[list[str]]:
    """Header, and a line of cells for each system with results; its label is the first of them."""
    several, searched = len(comparison.systems) > 1, any(s.search for s in comparison.systems)
    header = ['model', *(['learning rate'] if searched else []), 'backbone parameters']
    header += ['parameters', 'GFLOPs', 'forward, ms', 'train, ms']
    for metric in comparison.metrics:
        header += [metric, *(['difference'] if several else [])]
    lines = [header]
    for system in with_results(comparison):
        costs = system.costs
        line = [system.label]
        if searched:
            line.append(f'{system.recipe.rate:.3g}{" (edge)" if system.at_edge else ""}')
        line += [f'{costs[k]:,}' if costs else '' for k in ('backbone_parameters', 'parameters')]
        line.append(f'{costs["flops"] / 1e9:.3g}' if costs else '')
        line += [f'{1e3 * costs[m]:.1f}' if m in costs else '' for m in ('forward', 'train')]
        for metric in comparison.metrics:
            found = summarise(comparison, system, metric)
            line.append(f'{found.mean.text()} ({", ".join(found.outcomes)})')
            if several:
                line.append(found.difference.text('+') if found.difference else '')
        lines.append(line)
    return lines


def search_table(comparison: Comparison) -> list[list[str]]:
    """Header, and a line for each system: the first metric by learning rates, and the choice."""
    factors = [run.recipe.factor for run in comparison.systems[0].search]
    lines = [['model', *(f'{factor:g}x' for factor in factors), 'chosen']]
    for system in comparison.systems:
        cells = [f'{r.recipe.rate:.3g}: {outcome(r, comparison.metrics[0])}' for r in system.search]
        chosen = 'none' if system.recipe is None else f'{system.recipe.rate:.3g}'
        edge = ', at the edge' if system.at_edge else ''
        lines.append([system.label, *cells, f'{chosen}{edge}'])
    return lines


def report(comparison: Comparison) -> list[str]:
    """Lines for a terminal: the table, that of the search before it if there was one."""
    tables = [table(comparison)]
    if comparison.systems[0].search:
        tables.insert(0, search_table(comparison))
    return [line for lines in tables for line in ['', *align([tuple(cells) for cells in lines])]]


# Files.


def write_report(
    comparison: Comparison,
    out: str | Path,
    costs: Sequence[str] = DEFAULT_COSTS,
    command: Sequence[str] | None = None,
) -> None:
    """Write OUT.csv with a line for each run, OUT.md, OUT.json and OUT.png.

    Args:
        comparison (Comparison): With results of at least one system.
        out (str | Path): The files without their suffixes; their folder is made.
        costs (Sequence[str]): What to plot the first metric against, of 'flops', 'parameters',
            'forward' and 'train'. Default: the first three.
        command (Sequence[str] | None): Arguments of compare.py, to be named. Default: None.

    Raises:
        ValueError: If there are no results, or no such costs.
    """
    if not with_results(comparison):
        raise ValueError('a comparison must have a finished run to be reported, got none')
    unknown = [name for name in costs if name not in COSTS]
    if unknown or not costs:
        got = ', '.join(unknown) or 'none'
        raise ValueError(f'costs must be of {", ".join(COSTS)}, got {got}')
    write(Path(f'{out}.csv'), csv_text(comparison))
    write(Path(f'{out}.md'), markdown(comparison, Path(out), costs, command))
    write(Path(f'{out}.json'), json_text(comparison, command))
    plot(comparison, Path(f'{out}.png'), costs)


def csv_text(comparison: Comparison) -> str:
    """A line for each finished run, those of the search first: its own, then its system's."""
    lines = []
    for system in comparison.systems:
        lines += [_of_run(run, 'search', comparison) for run in system.search if run.finished]
        shared = _of_system(system, comparison)
        for run in system.runs(comparison.seeds):
            if run.finished:
                lines.append(_of_run(run, 'comparison', comparison) | shared)
    out = io.StringIO()
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(out, names, lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _of_run(run: Run, purpose: str, comparison: Comparison) -> dict[str, object]:
    """What the files tell of a run, 'search' or 'comparison' being its purpose."""
    return {
        'model': run.recipe.label,
        'config': relative(run.recipe.file),
        'purpose': purpose,
        'learning_rate': run.recipe.rate,
        'rate_factor': run.recipe.factor,
        'epochs': run.recipe.cfg.train_cfg.get('max_epochs'),
        'seed': run.seed,
        'outcome': 'finished' if run.divergence is None else 'diverged',
        **{metric: run.value(metric) for metric in comparison.metrics},
    }


def _of_system(system: System, comparison: Comparison) -> dict[str, object]:
    """What the files tell of a system: costs, means and differences with their intervals."""
    costs, told = system.costs, {}
    if costs:
        told |= {key: costs[key] for key in ('backbone_parameters', 'parameters')}
        told |= {'image': shape_name(costs['image']), 'gflops': costs['flops'] / 1e9}
    told |= {f'{mode}_ms': 1e3 * costs[mode] for mode in ('forward', 'train') if mode in costs}
    if comparison.finished(system):
        for metric in comparison.metrics:
            found = summarise(comparison, system, metric)
            for name, value in (('mean', found.mean), ('difference', found.difference)):
                if value is not None:
                    told[f'{metric} {name}'] = value.mean
                    told[f'{metric} {name} low'] = value.low
                    told[f'{metric} {name} high'] = value.high
    return told


def json_text(comparison: Comparison, command: Sequence[str] | None = None) -> str:
    """The same as in the table of runs, by systems, and where it comes from."""
    systems = [
        {
            'model': system.label,
            'config': relative(system.file),
            'learning_rate': None if system.recipe is None else system.recipe.rate,
            'at_edge_of_search': system.at_edge,
            **_of_system(system, comparison),
            'runs': [
                _of_run(run, purpose, comparison)
                for purpose, runs in (
                    ('search', system.search),
                    ('comparison', system.runs(comparison.seeds)),
                )
                for run in runs
                if run.finished
            ],
        }
        for system in comparison.systems
    ]
    content = {
        'command': None if command is None else f'{TOOL} {_shown(command)}',
        'date': str(datetime.date.today()),
        'device': device_name(comparison.device),
        'threads': comparison.threads,
        'torch': torch.__version__,
        'seeds': comparison.seeds,
        'confidence': CONFIDENCE,
        'systems': systems,
    }
    return json.dumps(content, indent=1)


def markdown(
    comparison: Comparison,
    out: Path,
    costs: Sequence[str] = DEFAULT_COSTS,
    command: Sequence[str] | None = None,
) -> str:
    """The tables, with what their figures are and where they come from."""
    budget = _budget(comparison.finished(with_results(comparison)[0])[0])
    images = {s.costs['image'] for s in comparison.systems if s.costs}
    seeds = ', '.join(map(str, comparison.seeds))
    axes = ' and '.join(COSTS[name][1] for name in costs)
    parts = ['# Comparison']
    if command is not None:
        parts.append(f'```bash\npython {TOOL} {_shown(command)}\n```')
    parts += [
        _markdown_table(table(comparison), comparison, out),
        f'![{comparison.metrics[0]} against {axes}]({out.name}.png)',
        f"""\
* Accuracy: mean ± 95 % confidence interval (Student's t, of the spread over seeds), and each run,
  with seeds {seeds}. On the validation data, after training with {budget}.
* Difference: to {comparison.systems[0].label}, by runs of the same seed: mean ± 95 % confidence
  interval.
* FLOPs: multiplications of convolutions, matrix products, attention and aggregation in the
  prediction of one image ({', '.join(sorted(map(shape_name, images)))}).
* Time: of one image, median of {ROUNDS} rounds in turns, {datetime.date.today()},
  {_machine(comparison)}.
  Forward is the prediction of one image; train is forward and backward pass of a batch, by the
  number of its images.""",
    ]
    search = comparison.systems[0].search
    if search:
        parts += [
            '## Search of learning rates',
            _markdown_table(search_table(comparison), comparison, out),
            f"""\
{comparison.metrics[0]} with seed {search[0].seed}, after training with {_budget(search[0])}, at
factors of each config's own rate. The best is taken for all seeds, and of equal ones that next to
the config's own. Diverged: training stopped at a loss that was not finite. At the edge: the best
rate may lie outside of those searched.""",
        ]
    return '\n\n'.join(parts) + '\n'


def _budget(run: Run) -> str:
    cfg = run.recipe.cfg
    limits = [f'{key} {value}' for key, value in cfg.train_cfg.items() if key.startswith('max_')]
    return f'{", ".join(limits)}, batch_size {cfg.train_dataloader.batch_size}'


def _markdown_table(lines: list[list[str]], comparison: Comparison, out: Path) -> str:
    """A table whose first cells link to the configs."""
    files = {
        system.label: os.path.relpath(system.file, out.parent) for system in comparison.systems
    }
    header, *rows = lines
    rows = [[f'[{label}]({files[label]})', *cells] for label, *cells in rows]
    marks = ['---', *['---:'] * (len(header) - 1)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in [header, marks, *rows])


def _machine(comparison: Comparison) -> str:
    device = device_name(comparison.device)
    return f'{device}, {comparison.threads} CPU threads, torch {torch.__version__}'


def _shown(command: Sequence[str]) -> str:
    return shlex.join(relative(argument) for argument in command)


def relative(argument: str) -> str:
    """An argument or KEY=VALUE whose path does not depend on where the working directory is."""
    key, equals, value = argument.rpartition('=')
    return f'{key}{equals}{os.path.relpath(value)}' if os.path.isabs(value) else argument


def plot(comparison: Comparison, file: Path, costs: Sequence[str] = DEFAULT_COSTS) -> None:
    """The first metric against costs: the mean with its interval, and every run as a dot."""
    metric, systems = comparison.metrics[0], with_results(comparison)
    width = max(6.0, 4.3 * len(costs))
    figure = matplotlib.figure.Figure(figsize=(width, 4.5), layout='constrained')
    figure.suptitle(_machine(comparison))
    axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, costs, strict=True):
        unit, label = COSTS[name]
        places = [system.costs.get(name, math.nan) / unit for system in systems]
        for index, (system, x) in enumerate(zip(systems, places, strict=True)):
            values = [run.value(metric) for run in comparison.finished(system)]
            found = estimate(values)
            style = {'color': f'C{index % 10}', 'marker': 'os^Dv'[index // 10 % 5]}
            axis.errorbar(
                x, found.mean, found.margin, linestyle='', capsize=3, label=system.label, **style
            )
            axis.plot([x] * len(values), values, '.', color=style['color'], mfc='w', zorder=3)
        axis.set_xlim(0, 1.1 * max((x for x in places if x > 0), default=1))
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f'{metric}: mean, 95 % interval, runs')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), 4))
    write_figure(file, figure, dpi=120)
