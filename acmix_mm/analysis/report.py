"""Tables and plots of measured times and of costs by stage."""

import csv
import io
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.figure

from ..files import write_figure
from .costs import NetworkCosts, OperatorCosts, Stages


def quartiles(times: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(times * 2 if len(times) == 1 else times, method='inclusive')


def shape_name(shape: list[int]) -> str:
    return 'x'.join(map(str, shape))


def readable(count: int) -> str:
    """Millions or billions; small numbers as they are."""
    if count < 1e5:
        return f'{count:,}'
    return f'{count / 1e9:.2f} G' if count >= 1e9 else f'{count / 1e6:.2f} M'


@dataclass(frozen=True)
class Peaks:
    """What a device can do: 10^12 operations a second by dtype, 10^9 bytes a second.

    ``float32_tflops`` are those outside matrix units, for attention: its neighbourhoods are no
    matrices, and matrix units multiply many keys that no query asks for.
    """

    tflops: dict[str, float] = field(default_factory=dict)
    gbs: float | None = None
    float32_tflops: float | None = None


def floor_fraction(row: dict, peaks: Peaks) -> str:
    """How near the time is to the least the device could take, and what bounds that."""
    floors = {}
    if 'flops' in row and row['dtype'] in peaks.tflops:
        floors['arithmetic'] = row['flops'] / (peaks.tflops[row['dtype']] * 1e12)
    if 'attention_flops' in row and peaks.float32_tflops:
        floors['float32 arithmetic'] = row['attention_flops'] / (peaks.float32_tflops * 1e12)
    if 'bytes' in row and peaks.gbs:
        floors['bandwidth'] = row['bytes'] / (peaks.gbs * 1e9)
    if not floors:
        return ''
    bound = max(floors, key=floors.get)
    return f'{floors[bound] / quartiles(row["times"])[1]:.1%} {bound}'


def report(rows: list[dict], peaks: Peaks) -> list[str]:
    """Lines of the table; ratios are to the first candidate of the same shape, mode and dtype."""
    lines, first = [], {}
    header = ('candidate', 'median', 'quartiles', 'time', 'peak memory', 'memory', 'weights')
    for row in rows:
        key = (shape_name(row['shape']), row['dtype'], row['mode'])
        if key not in first:
            lines += [('', *[''] * len(header)), (', '.join(key), *[''] * len(header))]
            first[key] = row
        base = first[key]
        if not row['times']:
            reason = row.get('unavailable', 'failed')
            lines.append((f'  {row["candidate"]}', reason, *[''] * (len(header) - 1)))
            continue
        low, median, high = (1e3 * t for t in quartiles(row['times']))
        cells = [f'  {row["candidate"]}', f'{median:.2f} ms', f'{low:.2f} - {high:.2f} ms']
        cells.append(f'{median / 1e3 / quartiles(base["times"])[1]:.2f}x' if base['times'] else '')
        if row['peak'] is None:
            cells += ['', '']
        else:
            ratio = f'{row["peak"] / base["peak"]:.2f}x' if base['peak'] else ''
            cells += [f'{row["peak"] / 2**20:.1f} MiB', ratio]
        cells.append(f'{row["weights"] / 2**20:.1f} MiB' if row.get('weights') else '')
        lines.append((*cells, floor_fraction(row, peaks)))
    has_floor = any(line[-1] for line in lines)
    return align([(*header, 'of the floor' if has_floor else ''), *lines])


def report_fps(rows: list[dict]) -> list[str]:
    """Lines of the table of frames a second; ratios are to the first of the same shape and dtype.

    Rows have ``parameters`` and ``flops``, as far as they are known.
    """
    header = ('candidate', 'frames/s', 'quartiles', 'ratio', 'parameters', 'FLOPs')
    empty = ('',) * (len(header) - 1)
    lines, first = [header], {}
    for row in rows:
        key = (shape_name(row['shape']), row['dtype'])
        if key not in first:
            lines += [('', *empty), (', '.join(key), *empty)]
            first[key] = row
        cells = [f'  {row["candidate"]}', 'failed', '', '']
        if row['times']:
            low, median, high = (1 / seconds for seconds in reversed(quartiles(row['times'])))
            base = first[key]['times']
            ratio = f'{median * quartiles(base)[1]:.2f}x' if base else ''
            cells[1:] = [f'{median:.2f}', f'{low:.2f} - {high:.2f}', ratio]
        cells += [readable(row[name]) if name in row else '' for name in ('parameters', 'flops')]
        lines.append(tuple(cells))
    return align(lines)


def per_doubling(value: float, before: float, pixels: int, pixels_before: int) -> float:
    """Factor of the cost when pixels double, from two measurements at any two pixel counts."""
    return (value / before) ** (math.log(2) / math.log(pixels / pixels_before))


def by_series(rows: list[dict]) -> dict[tuple[str, ...], list[dict]]:
    """Rows of the suite scaling with times, in the lines that they make."""
    lines: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        if row['times']:
            key = (row['candidate'], row['series'], row['dtype'], row['mode'])
            lines.setdefault(key, []).append(row)
    return lines


def report_scaling(rows: list[dict]) -> list[str]:
    """Lines of the table of the suite scaling: each row against the one before."""
    header = ('image', 'median', 'time/pixel', 'per doubling', 'peak', 'peak/pixel', 'per doubling')
    lines = [header]
    empty = ('',) * len(header)
    for (candidate, axis, dtype, mode), points in by_series(rows).items():
        lines += [empty, (f'{candidate}, growing {axis}, {dtype}, {mode}', *empty[1:])]
        before = None
        for row in points:
            pixels, median = row['pixels'], quartiles(row['times'])[1]
            cells = [f'  {shape_name(row["image"])}', f'{1e3 * median:.2f} ms']
            cells += [f'{1e9 * median / pixels:.1f} ns', '', '', '', '']
            if before is not None:
                counts = (pixels, before['pixels'])
                factor = per_doubling(median, quartiles(before['times'])[1], *counts)
                cells[3] = f'{factor:.2f}x'
            if row['peak'] is not None:
                cells[4] = f'{row["peak"] / 2**20:.1f} MiB'
                cells[5] = f'{row["peak"] / pixels:.0f} B'
                if before is not None and before['peak'] and row['peak']:
                    cells[6] = f'{per_doubling(row["peak"], before["peak"], *counts):.2f}x'
            lines.append(tuple(cells))
            before = row
    failed = [row for row in rows if not row['times']]
    lines += [
        (f'{shape_name(row["image"])}, {row["mode"]}', 'failed', *empty[2:]) for row in failed
    ]
    return align(lines)


def align(lines: list[tuple[str, ...]]) -> list[str]:
    """Columns of equal width, the first to the left; titles alone in a line widen none."""
    widths = [
        max(len(line[i]) for line in lines if i or any(line[1:])) for i in range(len(lines[0]))
    ]
    aligned = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        aligned.append('  '.join(cells).rstrip())
    return aligned


def plot(rows: list[dict], setting: dict, file: Path) -> None:
    """Times, and peak memory where it was measured: bars, or lines over pixels for scaling.

    Of the suite fps, frames a second.
    """
    rows = [row for row in rows if row['times']]
    scaling = setting['suite'] == 'scaling'
    panels = 1 + any(row['peak'] is not None for row in rows)
    height = 4.5 if scaling else max(2.5, 1.2 + 0.24 * len(rows))
    width = 6 * panels if scaling else 6 * panels + 3  # names of bars are long
    figure = matplotlib.figure.Figure(figsize=(width, height), layout='constrained')
    figure.suptitle(f'{setting["device"]}, {setting["threads"]} threads, torch {setting["torch"]}')
    axes = figure.subplots(1, panels, sharey=not scaling, squeeze=False)[0]
    if rows:
        if scaling:
            _plot_scaling(axes, rows)
        else:
            _plot_bars(axes, rows, speed=setting['suite'] == 'fps')
    write_figure(file, figure, dpi=120)


def _plot_bars(axes, rows: list[dict], speed: bool) -> None:
    names = list(dict.fromkeys(row['candidate'] for row in rows))
    labels = [
        f'{shape_name(row["shape"])} {row["dtype"]} {row["mode"]}: {row["candidate"]}'
        for row in rows
    ]
    colors = [f'C{names.index(row["candidate"]) % 10}' for row in rows]
    spread = [quartiles([1 / t if speed else 1e3 * t for t in row['times']]) for row in rows]
    errors = [[m - low for low, m, _ in spread], [high - m for _, m, high in spread]]
    places = range(len(rows))
    axes[0].barh(places, [median for _, median, _ in spread], xerr=errors, color=colors)
    what = 'frames a second: median and quartiles'
    axes[0].set_xlabel(what if speed else 'time of a step: median and quartiles, ms')
    axes[0].set_yticks(places, labels, fontsize=8)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    for axis in axes[1:]:
        axis.barh(places, [(row['peak'] or 0) / 2**20 for row in rows], color=colors)
        axis.set_xlabel('peak memory beyond what was held, MiB')


def _plot_scaling(axes, rows: list[dict]) -> None:
    def median(row: dict) -> float:
        return 1e3 * quartiles(row['times'])[1]

    def peak(row: dict) -> float:
        return (row['peak'] or math.nan) / 2**20

    panels = ((median, 'median time of a step, ms'), (peak, 'peak memory, MiB'))
    for axis, (value, label) in zip(axes, panels, strict=False):
        for index, (key, points) in enumerate(by_series(rows).items()):
            pixels = [row['pixels'] for row in points]
            values = [value(row) for row in points]
            axis.plot(pixels, values, 'o-', color=f'C{index % 10}', label=', '.join(key))
            proportional = [values[0] * p / pixels[0] for p in pixels]
            axis.plot(pixels, proportional, ':', color=f'C{index % 10}')
        axis.set(xscale='log', yscale='log', xlabel='pixels (dotted: proportional)', ylabel=label)
    axes[0].legend(fontsize=8)


# Costs by stage.

STAGES = {
    'projection': 'Stage I: projections',
    'attention': 'Stage II: attention path',
    'convolution': 'Stage II: convolution path',
}
# Forms of a mixed operator, attributes of OperatorCosts, in which a network is compared.
FORMS = {
    'mixed': 'mixed operators',
    'convolution': 'plain convolutions in their place',
    'self_attention': 'self-attention alone in their place',
}


def report_costs(costs: NetworkCosts) -> list[str]:
    """Lines of the table of a network's mixed operators by stage, and of Stage I's shares."""
    stages = {form: costs.stages(form) for form in FORMS}
    lines = [('', 'parameters', 'FLOPs', 'share')]
    for form, title in FORMS.items():
        if stages[form] is None:
            continue
        lines += [('', '', '', ''), (title, '', '', '')]
        lines += _stage_lines(stages[form], form)
        if form == 'mixed':
            flops = costs.stages('two_steps').convolution.flops
            lines.append(("  (convolution path in the paper's two steps)", '', readable(flops), ''))
    lines += [('', '', '', ''), ('the network with', '', '', '')]
    for form, title in FORMS.items():
        whole = costs.whole_with(form)
        if whole is not None:
            lines.append((f'  {title}', readable(whole.parameters), readable(whole.flops), ''))

    shares = [('', 'of all FLOPs', 'mean over operators'), ("Stage I's share", '', '')]
    names = dict(FORMS)
    if any(operator.stride > 1 for operator in costs.operators):
        names['self_attention_at_output'] = '  both stages at the size of the output'
    for form, title in names.items():
        whole = costs.stages(form)
        if whole is not None:
            values = (whole.projection_share, costs.mean_projection_share(form))
            shares.append((f'  {title}', *(f'{value:.1%}' for value in values)))
    return [*align(lines), '', *align(shares)]


def _stage_lines(stages: Stages, form: str) -> Iterator[tuple[str, ...]]:
    total = stages.total
    for stage, title in STAGES.items():
        cost = getattr(stages, stage)
        if not cost.flops and not cost.parameters:
            continue
        if form == 'convolution' and stage == 'convolution':
            title = 'Stage II: additions'
        share = f'{cost.flops / total.flops:.1%}' if total.flops else ''
        yield f'  {title}', readable(cost.parameters), readable(cost.flops), share
    yield '  both stages', readable(total.parameters), readable(total.flops), ''


def report_operators(costs: NetworkCosts) -> list[str]:
    """Lines of the table with a line for each mixed operator; FLOPs in millions."""

    def millions(flops: int | None) -> str:
        return '' if flops is None else f'{flops / 1e6:.2f}'

    header = ('operator, MFLOPs', 'class', 'channels', 'map', 'parameters', 'Stage I', 'attention')
    header += ('convolution', 'both stages', 'counted', 'Stage I')
    header += ('plain conv I', 'II', 'attention I', 'II')
    lines = [header]
    for operator in costs.operators:
        mixed, plain, alone = operator.mixed, operator.convolution, operator.self_attention
        cells = [operator.name, operator.kind, '-'.join(map(str, operator.channels))]
        cells += [maps_name(operator), f'{mixed.total.parameters:,}']
        parts = (mixed.projection, mixed.attention, mixed.convolution, mixed.total)
        cells += [millions(cost.flops) for cost in parts]
        cells += [millions(operator.counted), f'{mixed.projection_share:.1%}']
        for form, second in ((plain, 'convolution'), (alone, 'attention')):
            pair = (form.projection, getattr(form, second)) if form else (None, None)
            cells += [millions(cost and cost.flops) for cost in pair]
        lines.append(tuple(cells))
    return align(lines)


def maps_name(operator: OperatorCosts) -> str:
    """Sizes of the maps that an operator gets, by calls, and its stride if it has one."""
    stride = f' /{operator.stride}' if operator.stride > 1 else ''
    return ', '.join(shape_name(size) for size in operator.maps) + stride


def operators_csv(costs: NetworkCosts) -> str:
    """A line for each mixed operator with all its costs; what an operator has not is empty."""
    rows = []
    for operator in costs.operators:
        row = {'operator': operator.name, 'class': operator.kind, 'stride': operator.stride}
        row |= {'channels_in': operator.channels[0], 'channels_out': operator.channels[1]}
        row |= {'maps': ' '.join(map(shape_name, operator.maps)), 'counted': operator.counted}
        for form, stages in asdict(operator).items():
            if form in (*FORMS, 'two_steps', 'self_attention_at_output'):
                for stage in STAGES:
                    cost = stages[stage] if stages else {'parameters': '', 'flops': ''}
                    row |= {f'{form} {stage} {what}': value for what, value in cost.items()}
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else ['operator'], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def plot_stages(costs: NetworkCosts, title: str, file: Path) -> None:
    """FLOPs of each mixed operator by stage, against depth, beside what could take its place.

    Raises:
        ValueError: If there are no mixed operators.
    """
    if not costs.operators:
        raise ValueError('costs must be those of a network with mixed operators, got none')
    forms = [form for form in FORMS if costs.stages(form) is not None]
    width = max(4.0, 1.2 + 0.16 * len(costs.operators))
    figure = matplotlib.figure.Figure(figsize=(width * len(forms), 4.5), layout='constrained')
    figure.suptitle(title)
    axes = figure.subplots(1, len(forms), sharey=True, squeeze=False)[0]
    places = range(len(costs.operators))
    paths = f'{STAGES["convolution"]} (additions of plain convolutions)'
    names = [operator.name.removeprefix('backbone.') for operator in costs.operators]
    for axis, form in zip(axes, forms, strict=True):
        base = [0.0] * len(names)
        for index, (stage, label) in enumerate({**STAGES, 'convolution': paths}.items()):
            stages = [getattr(operator, form) for operator in costs.operators]
            values = [getattr(s, stage).flops / 1e6 for s in stages]
            axis.bar(places, values, bottom=base, color=f'C{index}', label=label)
            base = [b + v for b, v in zip(base, values, strict=True)]
        share = costs.stages(form).projection_share
        axis.set_title(f'{FORMS[form]}: Stage I {share:.1%}', fontsize=10)
        axis.set_xticks(places, names, rotation=90, fontsize=7)
        axis.grid(axis='y', alpha=0.3)
    axes[0].set_ylabel('MFLOPs of an operator')
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(labels))
    write_figure(file, figure, dpi=120)
