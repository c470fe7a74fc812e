"""Pictures of attention weights, of what each path adds, and of shift kernels."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from ..files import write_figure
from .attention import Attention, ShiftKernels
from .images import Frame
from .path_bias import short_names

MOST_GROUPS = 8  # in a picture
POSITIVE, EITHER_SIGN, SHARE = 'inferno', 'RdBu_r', 'PuOr_r'
DPI = 100


def scale_of(weights: np.ndarray, signed: bool) -> tuple[str, Normalize]:
    """Colours for weights: from 0 to the largest, or on both sides of 0."""
    largest = float(np.abs(weights).max()) or 1.0
    if signed:
        return EITHER_SIGN, CenteredNorm(0, halfrange=largest)
    return POSITIVE, Normalize(0, largest)


def extent_of(frame: Frame, rows: float, cols: float, size: tuple[int, int]) -> list[float]:
    """Where ``rows`` and ``cols`` of a map of that size lie in the image, for matplotlib.

    A pixel of the image is a square around its coordinates.
    """
    left, top = frame.to_image(0, 0)
    across, down = frame.input[1] / size[1], frame.input[0] / size[0]
    right, bottom = frame.to_image(cols * across, rows * down)
    return [side - 0.5 for side in (left, right, bottom, top)]


def show_image(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(image)
    axis.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5))
    axis.set_ylim(image.shape[0] - 0.5, -0.5)


def _bar(figure: Figure, shown: AxesImage, axis: Axes) -> None:
    bar = figure.colorbar(shown, ax=axis, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=7)


def plot_attention(
    attentions: Sequence[Attention],
    image: np.ndarray,
    frame: Frame,
    point: tuple[int, int],
    file: str | Path,
) -> None:
    """Weights of the position of one pixel: a row for each layer, a column for each head.

    Args:
        attentions (Sequence[Attention]): Of the layers.
        image (np.ndarray): RGB, (H, W, 3).
        frame (Frame): Where it lies in the network's input.
        point (tuple[int, int]): Pixel (x, y) of the image.
        file (str | Path): The picture, whose suffix decides on the format.
    """
    columns = 2 + min(MOST_GROUPS, max(a.groups for a in attentions))
    figure = Figure(
        figsize=(1.9 * columns + 1.2, 2.15 * len(attentions) + 0.5), layout='constrained'
    )
    figure.suptitle(
        f'Attention weights of pixel x = {point[0]}, y = {point[1]} (cross, white frames): how '
        'much it takes from where.\nStrokes: beyond the border, where maps are reflected or padded',
        fontsize=11,
    )
    widths = [1.0] * columns + [0.06]  # the last one is of the scales
    grid = figure.subplots(len(attentions), columns + 1, squeeze=False, width_ratios=widths)
    names = short_names([a.name for a in attentions])
    for axes, attention, name in zip(grid, attentions, names, strict=True):
        row, col = frame.cell(*point, attention.query_size)
        query = torch.tensor([[row, col]])
        weights = attention.weights(query)[0].numpy(force=True)
        _overlay(axes[0], attention, image, frame, point, query)
        axes[0].set_ylabel('\n'.join([name, *textwrap.wrap(attention.kind, 34)]), fontsize=7)
        mean = weights.mean(0)
        group = attention.group_name
        shown_groups = [(f'{group} {i + 1}', w) for i, w in enumerate(weights)][: columns - 2]
        if attention.groups > 1:
            shown_groups.insert(0, (f'mean of {attention.groups} {group}s', mean))
        colours, norm = scale_of(np.stack([w for _, w in shown_groups]), attention.signed)
        own, beyond = attention.own(query)[0].item(), attention.beyond(query)[0].tolist()
        for axis, (title, values) in zip(axes[1:], shown_groups, strict=False):
            cells = values.reshape(attention.grid)
            shown = axis.imshow(cells, colours, norm=norm, interpolation='nearest')
            axis.set_title(title, fontsize=8)
            axis.set(xticks=[], yticks=[])
            _mark_keys(axis, attention, own, beyond)
        for axis in axes[len(shown_groups) + 1 : columns]:
            axis.set_axis_off()
        label = 'weight' if attention.signed else 'weight (sum: 1)'
        bar = figure.colorbar(shown, cax=axes[-1])
        bar.ax.tick_params(labelsize=7)
        bar.set_label(label, fontsize=8)
    write_figure(file, figure, dpi=DPI)


def _mark_keys(axis: Axes, attention: Attention, own: int, beyond: Sequence[bool]) -> None:
    """A frame around the position itself, strokes through what is beyond the border."""
    cols = attention.grid[1]
    for key, outside in enumerate(beyond):
        if outside:
            x, y = key % cols, key // cols
            axis.plot([x - 0.4, x + 0.4], [y + 0.4, y - 0.4], color='0.5', linewidth=0.6)
    corner = (own % cols - 0.5, own // cols - 0.5)
    for colour, width in (('black', 3), ('white', 1.4)):
        axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _overlay(
    axis: Axes,
    attention: Attention,
    image: np.ndarray,
    frame: Frame,
    point: tuple[int, int],
    query: torch.Tensor,
) -> None:
    """The mean of all heads on the image, which is darkened."""
    show_image(axis, (image * 0.6).astype(np.uint8))
    on_map = attention.on_map(query)[0].mean(0).numpy(force=True)
    colours, norm = scale_of(on_map, attention.signed)
    rows, cols = (n * attention.key_size for n in on_map.shape)
    axis.imshow(
        on_map,
        colours,
        norm=norm,
        alpha=0.9 * np.sqrt(np.abs(on_map) / (np.abs(on_map).max() or 1)),
        extent=extent_of(frame, rows, cols, attention.size),
        interpolation='nearest',
    )
    show_limits(axis, image)
    axis.plot(*point, '+', color='white', markersize=9, markeredgewidth=2.2)
    axis.plot(*point, '+', color='black', markersize=8, markeredgewidth=0.8)


def show_limits(axis: Axes, image: np.ndarray) -> None:
    """Only what is in the image; maps may extend over padding."""
    axis.set_xlim(-0.5, image.shape[1] - 0.5)
    axis.set_ylim(image.shape[0] - 0.5, -0.5)


def plot_paths(
    attentions: Sequence[Attention], image: np.ndarray, frame: Frame, file: str | Path
) -> None:
    """What each path adds at every position: a row for each layer.

    Root mean squares over channels of ``rate1 * attention``, ``rate2 * convolution`` and their sum,
    in one scale, and the attention path's share of the two mean squares.

    Args:
        attentions (Sequence[Attention]): Of the layers.
        image (np.ndarray): RGB, (H, W, 3).
        frame (Frame): Where it lies in the network's input.
        file (str | Path): The picture, whose suffix decides on the format.
    """
    aspect = image.shape[0] / image.shape[1]
    figure = Figure(
        figsize=(12.5, (2.3 * aspect + 0.25) * len(attentions) + 0.8), layout='constrained'
    )
    figure.suptitle(
        'What the two paths add to the output of a layer: root mean squares over channels, and the '
        "attention path's share of the two mean squares",
        fontsize=11,
    )
    grid = figure.subplots(len(attentions), 5, squeeze=False)
    names = short_names([a.name for a in attentions])
    titles = ('image', 'attention path', 'convolution path', 'their sum', "attention's share")
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axes, attention, name in zip(grid, attentions, names, strict=True):
        terms = attention.path_terms()
        squares = [t.double().square().mean(0).numpy(force=True) for t in (*terms, sum(terms))]
        share = squares[0] / np.maximum(squares[0] + squares[1], np.finfo(float).tiny)
        total = squares[0].mean() / max(squares[0].mean() + squares[1].mean(), 1e-300)
        show_image(axes[0], image)
        axes[0].set_ylabel(f'{name}\n{type(attention.operator).__name__}', fontsize=8)
        largest = max(np.sqrt(square).max() for square in squares) or 1.0
        extent = extent_of(frame, *share.shape, share.shape)
        for axis, square in zip(axes[1:4], squares, strict=True):
            shown = axis.imshow(
                np.sqrt(square), POSITIVE, norm=Normalize(0, largest), extent=extent,
                interpolation='nearest',
            )  # fmt: skip
        _bar(figure, shown, axes[3])
        shown = axes[4].imshow(
            share, SHARE, norm=TwoSlopeNorm(0.5, 0, 1), extent=extent, interpolation='nearest'
        )
        _bar(figure, shown, axes[4])
        axes[4].set_xlabel(f'{total:.0%} over the whole input', fontsize=8)
        for axis in axes[1:]:
            axis.set(xticks=[], yticks=[])
            show_limits(axis, image)
    write_figure(file, figure, dpi=DPI)


def mosaic(kernels: np.ndarray, columns: int) -> np.ndarray:
    """Small kernels (n, k, k) side by side, with gaps of NaN between them."""
    count, side, _ = kernels.shape
    rows = -(-count // columns)
    out = np.full((rows * (side + 1) - 1, columns * (side + 1) - 1), np.nan)
    for i, kernel in enumerate(kernels):
        top, left = i // columns * (side + 1), i % columns * (side + 1)
        out[top : top + side, left : left + side] = kernel
    return out


def plot_shift_kernels(kernels: Mapping[str, ShiftKernels], file: str | Path) -> None:
    """Learned shift kernels beside the shifts where training starts by default, a row a layer.

    Args:
        kernels (Mapping[str, ShiftKernels]): By names of layers.
        file (str | Path): The picture, whose suffix decides on the format.
    """
    figure = Figure(figsize=(12.5, 2.75 * len(kernels) + 0.6), layout='constrained')
    figure.suptitle(
        'Shift kernels of the convolution path, one for each kernel position, in the order of the '
        'positions',
        fontsize=11,
    )
    grid = figure.subplots(len(kernels), 4, squeeze=False)
    names = short_names(list(kernels))
    for axes, name, kernel in zip(grid, names, kernels.values(), strict=True):
        side = kernel.initial.size(-1)
        largest = max(1.0, kernel.mean.abs().max().item())
        pictures = (
            ('shifts (the default start)', kernel.initial, side, EITHER_SIGN, largest),
            ('learned: mean over outputs', kernel.mean, side, EITHER_SIGN, largest),
            ('change: RMS over outputs', kernel.change, side, POSITIVE, None),
            (
                'learned, with fc: RMS over outputs', kernel.folded.flatten(0, 1),
                len(kernel.column_names), POSITIVE, None,
            ),
        )  # fmt: skip
        for axis, (title, values, count, colours, limit) in zip(axes, pictures, strict=True):
            cells = mosaic(values.numpy(force=True), count)
            norm = Normalize(-limit, limit) if limit else Normalize(0, np.nanmax(cells) or 1)
            shown = axis.imshow(cells, colours, norm=norm, interpolation='nearest')
            for left in range(0, cells.shape[1], side + 1):
                for top in range(0, cells.shape[0], side + 1):
                    edge = Rectangle((left - 0.5, top - 0.5), side, side, fill=False, ec='0.6')
                    axis.add_patch(edge)
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(False)
            axis.set_title(title, fontsize=9)
            _bar(figure, shown, axis)
        names_of_maps = (
            (axes[3].set_yticks, kernel.row_names),
            (axes[3].set_xticks, kernel.column_names),
        )
        for set_ticks, labels in names_of_maps:
            set_ticks([i * (side + 1) + (side - 1) / 2 for i in range(len(labels))], labels)
        axes[3].tick_params(length=0, labelsize=8)
        axes[0].set_ylabel(f'{name}\nchanged by {kernel.relative_change:.0%}', fontsize=9)
    write_figure(file, figure, dpi=DPI)
