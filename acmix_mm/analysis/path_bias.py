"""Which path mixed operators prefer: their rates, and each path's share of what they put out.

After "On the Integration of Self-Attention and Convolution", CVPR 2022, section 5.4 and figure 5.
Rates come from a model, a checkpoint, or what :class:`~acmix_mm.engine.PathBiasHook` has written.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import matplotlib.figure
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checkpoints import read_checkpoint, state_dict_of
from ..engine import newest_checkpoint
from ..engine.path_bias_hook import PREFIX
from ..files import write_figure
from ..layers import MixedOperator
from ..layers.path_rates import PathRates, check_not_deployed, mixed_operators, path_rates

__all__ = [
    'PathEnergy',
    'PathRates',
    'path_energy',
    'path_rates',
    'path_terms',
    'plot_path_bias',
    'rates_of_weights',
    'read_rates',
]

SCALARS = 'scalars.json'  # of mmengine's LocalVisBackend


# Rates.


def rates_of_weights(weights: Mapping[str, Tensor]) -> list[PathRates]:
    """Rates of all mixed operators of a state dict, in its order.

    An operator that has rate1 alone is one with ``mix='complementary'``, of which rate2 is
    1 - rate1.

    Raises:
        ValueError: If there are none, as for other values of ``mix`` and deployed models.
    """
    rates = []
    for name, rate1 in weights.items():
        operator, _, parameter = name.rpartition('.')
        if parameter == 'rate1':
            rate2 = weights.get(f'{operator}.rate2' if operator else 'rate2', 1 - rate1)
            rates.append(PathRates(operator, rate1.item(), rate2.item()))
    if not rates:
        raise ValueError(
            'weights must have learned rates, and have none: their model has no mixed operators, '
            'or they are deployed, or combined without learning (mix)'
        )
    return rates


def read_rates(path: str | Path) -> tuple[list[PathRates], Path]:
    """Rates of a training run or a checkpoint, and the file that they are from.

    Args:
        path (str | Path): A checkpoint; or a file ``scalars.json`` to which
            :class:`~acmix_mm.engine.PathBiasHook` has written, of which the last values count; or a
            work directory: the newest such file below it or, without one, its newest checkpoint.

    Raises:
        ValueError: If there is nothing of that kind, or no rates in it; the message names the file.
    """
    path = Path(path)
    if path.is_dir():
        logs = sorted(path.glob(f'**/{SCALARS}'), key=lambda log: log.stat().st_mtime)
        for log in reversed(logs):
            rates = _rates_of_log(log)
            if rates:
                return rates, log
        return _rates_of_checkpoint(checkpoint_in(path))
    if path.suffix == '.json':
        if not path.is_file():
            raise ValueError(f'log {path} does not exist')
        rates = _rates_of_log(path)
        if not rates:
            raise ValueError(f'log {path} holds no rates, which PathBiasHook would write')
        return rates, path
    return _rates_of_checkpoint(path)


def checkpoint_in(path: Path) -> Path:
    """The checkpoint, or the newest one of a work directory."""
    if not path.is_dir():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise ValueError(f'folder {path} holds no checkpoint, and no {SCALARS} with rates')
    return Path(newest)


def _rates_of_checkpoint(file: Path) -> tuple[list[PathRates], Path]:
    weights = state_dict_of(read_checkpoint(str(file)))
    try:
        return rates_of_weights(weights), file
    except ValueError as error:
        raise ValueError(f'checkpoint {file}: {error}') from None


def _rates_of_log(file: Path) -> list[PathRates]:
    """The last values in a log; empty if there are none."""
    found: dict[str, tuple[float, float]] = {}
    for number, line in enumerate(file.read_text(errors='replace').splitlines(), 1):
        try:
            scalars = json.loads(line)
        except ValueError:
            raise ValueError(f'log {file} is damaged: line {number} is no JSON') from None
        names = [k.partition('/')[2] for k in scalars if k.startswith(f'{PREFIX}_rate1/')]
        if names:
            found = {n: tuple(scalars[f'{PREFIX}_rate{i}/{n}'] for i in (1, 2)) for n in names}
    return [PathRates(name, *rates) for name, rates in found.items()]


# Energy.


@dataclass(frozen=True)
class PathEnergy:
    """Mean squares over images, positions and channels of what a mixed operator adds up.

    Args:
        name (str): Of the operator in its model.
        attention (float): Of ``rate1 * attention``.
        convolution (float): Of ``rate2 * convolution``.
        output (float): Of their sum, which also depends on how far the two agree.
    """

    name: str
    attention: float
    convolution: float
    output: float

    @property
    def attention_share(self) -> float:
        """Of the sum of the two mean squares, 0 to 1; NaN if both are 0."""
        total = self.attention + self.convolution
        return self.attention / total if total else math.nan


@torch.no_grad()
def path_terms(operator: MixedOperator, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """The two terms that a mixed operator adds up: ``rate1 * attention``, ``rate2 * convolution``.

    Each is computed by the operator itself, with the weights of the other path zero. A bias of the
    output and a shortcut around the operator belong to neither.

    Args:
        operator (MixedOperator): In evaluation mode, not deployed.
        *args: Of its forward.
        **kwargs: Of its forward.

    Returns:
        tuple[Tensor, Tensor]: Of the shape of its output. The path that ``mix`` leaves out is zero.

    Raises:
        ValueError: If the operator is deployed or in training mode.
    """
    check_not_deployed('operator', operator)
    if operator.training:
        raise ValueError('operator must be in evaluation mode, got one in training mode')
    call = inspect.signature(operator.forward).bind(*args, **kwargs)
    if 'identity' in call.signature.parameters:
        call.arguments['identity'] = torch.zeros_like(call.arguments['x'])
    weights = replace(operator.mixing_weights(), bias=None)

    def term(**changes) -> Tensor:
        changed = replace(weights, **changes)
        with mock.patch.object(operator, 'mixing_weights', return_value=changed):
            return operator.forward(*call.args, **call.kwargs)

    if not operator.with_convolution:
        attention = term()
        return attention, torch.zeros_like(attention)
    if not operator.with_attention:
        convolution = term()
        return torch.zeros_like(convolution), convolution
    nothing = {
        'kernel': torch.zeros_like(weights.kernel),
        'fc': None if weights.fc is None else torch.zeros_like(weights.fc),
        'fc_bias': None,
    }
    return term(**nothing), term(scale=weights.kernel.new_zeros(1))


def run_hooked(run: Callable[[], object], handles: Iterable[RemovableHandle]) -> None:
    """Call a function without gradients, and remove hooks that were set for it, whatever happens.

    Args:
        run (Callable[[], object]): Calls a model.
        handles (Iterable[RemovableHandle]): What registering the hooks has returned.
    """
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()


def path_energy(model: nn.Module, run: Callable[[], object]) -> list[PathEnergy]:
    """How much each path of the mixed operators contributes to their outputs on given images.

    The rates alone do not say: they scale outputs of different sizes.

    Args:
        model (nn.Module): In evaluation mode, not deployed.
        run (Callable[[], object]): Calls the model, for example ``lambda: model(images)``, once or
            several times. No gradients are computed in it.

    Returns:
        list[PathEnergy]: One for each operator, in the order of the model; of one that was not
        called all values are NaN.

    Raises:
        ValueError: If the model has no mixed operators, is deployed or in training mode, or if
            none of its operators was called.
    """
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in mixed_operators(model)}
    handles = []
    for name, operator in mixed_operators(model).items():
        check_not_deployed(name, operator)

        def add(operator, args, kwargs, output, total=sums[name]) -> None:
            terms = path_terms(operator, *args, **kwargs)
            squares = [t.double().square().sum().cpu() for t in (*terms, sum(terms))]
            total += torch.stack([*squares, squares[0].new_tensor(output.numel())])

        handles.append(operator.register_forward_hook(add, with_kwargs=True))
    run_hooked(run, handles)
    if not any(total[3] for total in sums.values()):
        raise ValueError('run must call the model, none of its mixed operators was called')
    return [PathEnergy(name, *(t[:3] / t[3]).tolist()) for name, t in sums.items()]


# The figure.

PANELS = (
    'weight of the attention path, |rate1|',
    'weight of the convolution path, |rate2|',
    'log |rate1 / rate2|',
)
SPREADS = ('range', 'std')


def short_names(names: Sequence[str]) -> list[str]:
    """Names of modules without the words, at both ends, that all of them share.

    Numbers stay, and the word before them: of ``a.stages.0.attn``, ``a.stages.1.attn``, 'stages.0'
    and 'stages.1' are left.
    """
    parts = [name.split('.') for name in names]
    start = end = 0
    if len(names) > 1:
        least = min(map(len, parts)) - 1
        while start < least and len({p[start] for p in parts}) == 1:
            start += 1
        if start and any(p[start].isdecimal() for p in parts):
            start -= 1
        while end < least - start and len({p[-1 - end] for p in parts}) == 1:
            if parts[0][-1 - end].isdecimal():
                break
            end += 1
    return ['.'.join(p[start : len(p) - end]) for p in parts]


def same_names(label: str, runs: Iterable[Sequence[PathRates | PathEnergy]]) -> list[str]:
    """Names of the operators, which must be those of all runs.

    Raises:
        ValueError: If they are not.
    """
    first, *others = ([entry.name for entry in run] for run in runs)
    for names in others:
        if names != first:
            odd = sorted(set(first) ^ set(names)) or names
            raise ValueError(
                f'runs of {label} must have the same mixed operators, and differ in {odd[0]}'
            )
    return first


def plot_path_bias(
    groups: Mapping[str, Sequence[Sequence[PathRates]]],
    file: str | Path,
    energies: Mapping[str, Sequence[Sequence[PathEnergy]]] | None = None,
    spread: str = 'range',
) -> None:
    """Rates of the paths and their ratio against depth (ACmix, figure 5), as a picture.

    Args:
        groups (Mapping[str, Sequence[Sequence[PathRates]]]): By label, the rates of each run, which
            have the same operators. Of several runs the mean is drawn, and their spread.
        file (str | Path): The picture, whose suffix decides on the format.
        energies (Mapping[str, Sequence[Sequence[PathEnergy]]] | None): For a fourth panel, the
            share of the attention path in the output's energy. Default: None.
        spread (str): 'range', from the smallest to the largest value, or 'std', one standard
            deviation of a sample to both sides. Default: 'range'.

    Raises:
        ValueError: If runs of a group have different operators, or spread is none of these.
    """
    if spread not in SPREADS:
        raise ValueError(f'spread must be one of {SPREADS}, got {spread!r}')
    values = {
        label: [
            [[abs(r.rate1) for r in run] for run in runs],
            [[abs(r.rate2) for r in run] for run in runs],
            [[r.log_ratio for r in run] for run in runs],
        ]
        for label, runs in groups.items()
    }
    panels = [*PANELS]
    for label, runs in (energies or {}).items():
        values[label].append([[e.attention_share for e in run] for run in runs])
    if energies:
        panels.append("attention's share of the two paths' energy")
    figure = matplotlib.figure.Figure(figsize=(4.6 * len(panels), 4.2), layout='constrained')
    axes = figure.subplots(1, len(panels))
    names = {label: same_names(label, runs) for label, runs in groups.items()}
    for axis, title, index in zip(axes, panels, range(len(panels)), strict=True):
        for number, label in enumerate(groups):
            _plot_group(axis, f'C{number}', label, np.array(values[label][index]), spread)
        axis.set_title(title, fontsize=11)
        _label_depth(axis, names)
        axis.grid(alpha=0.3)
    top = max(axis.get_ylim()[1] for axis in axes[:2])
    for axis in axes[:2]:
        axis.set_ylim(0, top)
    reach = 1.15 * max(0.1, *map(abs, axes[2].get_ylim()))
    axes[2].set_ylim(-reach, reach)
    _mark(axes[2], 0, 'attention has more weight', 'convolution has more weight')
    if energies:
        axes[3].set_ylim(0, 1)
        _mark(axes[3], 0.5, 'attention adds more', 'convolution adds more')
    axes[0].legend(fontsize=9)
    write_figure(file, figure, dpi=110)


def _plot_group(axis: Axes, colour: str, label: str, values: np.ndarray, spread: str) -> None:
    """Mean and spread of (runs, operators)."""
    depth = np.arange(1, values.shape[1] + 1)
    runs = len(values)
    values = np.where(np.isfinite(values), values, np.nan)
    mean = values.mean(0)
    if runs > 1:
        what = 'range' if spread == 'range' else 'standard deviation'
        label = f'{label}: mean and {what} of {runs} runs'
        low, high = values.min(0), values.max(0)
        if spread == 'std':
            deviation = values.std(0, ddof=1)
            low, high = mean - deviation, mean + deviation
        axis.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.plot(depth, mean, 'o-', color=colour, markersize=4, label=label)


def _label_depth(axis: Axes, names: Mapping[str, list[str]]) -> None:
    shown = max(names.values(), key=len)
    ticks = range(0, len(shown), math.ceil(len(shown) / 12))
    if all(group == shown[: len(group)] for group in names.values()):
        short = short_names(shown)
        axis.set_xticks([i + 1 for i in ticks], [short[i] for i in ticks], rotation=60, fontsize=8)
        axis.set_xlabel('mixed operator, from input to output')
    else:
        axis.set_xticks([i + 1 for i in ticks])
        axis.set_xlabel('mixed operator, counted from the input')


def _mark(axis: Axes, level: float, above: str, below: str) -> None:
    """A line where the paths are equal, and what its two sides mean."""
    axis.axhline(level, color='0.4', linewidth=1, linestyle='--', zorder=1)
    style = {'transform': axis.transAxes, 'fontsize': 8, 'color': '0.35', 'ha': 'right'}
    axis.text(0.98, 0.98, above, va='top', **style)
    axis.text(0.98, 0.02, below, va='bottom', **style)


def table_of(
    runs: Sequence[Sequence[PathRates]], energies: Sequence[Sequence[PathEnergy]] | None = None
) -> list[tuple[str, ...]]:
    """Means over runs as rows of a table, the first of them its header."""
    header = ['operator', '|rate1|', '|rate2|', 'log ratio']
    rows = []
    for entries in zip(*runs, strict=True):
        columns = zip(*([abs(r.rate1), abs(r.rate2), r.log_ratio] for r in entries), strict=True)
        rows.append([entries[0].name, *(f'{np.mean(column):.3f}' for column in columns)])
    if energies is not None:
        header.append("attention's energy")
        for row, entries in zip(rows, zip(*energies, strict=True), strict=True):
            row.append(f'{np.mean([e.attention_share for e in entries]):.1%}')
    return [tuple(header), *map(tuple, rows)]
