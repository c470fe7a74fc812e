"""What benchmark.py makes of its rows of results: tables and plots."""

import math
import statistics
from pathlib import Path

import matplotlib.figure

from ..files import write_figure


def quartiles(times: list[float]) -> list[float]:
    """Lower quartile, median and upper quartile."""
    return statistics.quantiles(times * 2 if len(times) == 1 else times, method='inclusive')


def shape_name(shape: list[int]) -> str:
    return 'x'.join(map(str, shape))


def floor_fraction(row: dict, peaks: tuple[float | None, float | None]) -> str:
    """How near the time is to the least the device could take, and what bounds that."""
    tflops, gbs = peaks
    floors = {}
    if tflops and 'flops' in row:
        floors['arithmetic'] = row['flops'] / (tflops * 1e12)
    if gbs and 'bytes' in row:
        floors['bandwidth'] = row['bytes'] / (gbs * 1e9)
    if not floors:
        return ''
    bound = max(floors, key=floors.get)
    return f'{floors[bound] / quartiles(row["times"])[1]:.1%} {bound}'


def report(rows: list[dict], peaks: tuple[float | None, float | None] = (None, None)) -> list[str]:
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
            lines.append((f'  {row["candidate"]}', 'failed', *[''] * (len(header) - 1)))
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
    """Times, and peak memory where it was measured: bars, or lines over pixels for scaling."""
    rows = [row for row in rows if row['times']]
    scaling = setting['suite'] == 'scaling'
    panels = 1 + any(row['peak'] is not None for row in rows)
    height = 4.5 if scaling else max(2.5, 1.2 + 0.24 * len(rows))
    figure = matplotlib.figure.Figure(figsize=(6 * panels, height), layout='constrained')
    figure.suptitle(f'{setting["device"]}, {setting["threads"]} threads, torch {setting["torch"]}')
    axes = figure.subplots(1, panels, sharey=not scaling, squeeze=False)[0]
    if rows:
        (_plot_scaling if scaling else _plot_bars)(axes, rows)
    write_figure(file, figure, dpi=120)


def _plot_bars(axes, rows: list[dict]) -> None:
    names = list(dict.fromkeys(row['candidate'] for row in rows))
    labels = [
        f'{shape_name(row["shape"])} {row["dtype"]} {row["mode"]}: {row["candidate"]}'
        for row in rows
    ]
    colors = [f'C{names.index(row["candidate"]) % 10}' for row in rows]
    spread = [quartiles([1e3 * t for t in row['times']]) for row in rows]
    errors = [[m - low for low, m, _ in spread], [high - m for _, m, high in spread]]
    places = range(len(rows))
    axes[0].barh(places, [median for _, median, _ in spread], xerr=errors, color=colors)
    axes[0].set_xlabel('time of a step: median and quartiles, ms')
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
