"""Draw the picture of docs/how_it_works.md: ACmix as published, and as computed here."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

COLOURS = {'map': '#ffffff', 'stage1': '#cfe3f7', 'attention': '#f9d9b8', 'convolution': '#cdebd0'}
OUTPUT = Path(__file__).resolve().parents[2] / 'docs/images/operator/operator.png'

# What is drawn: name -> (x, y, width, text, kind).
PUBLISHED = {
    'x': (0, 2, 1.5, 'input\nC maps', 'map'),
    'qkv': (2.6, 2, 2.2, 'three 1x1\nconvolutions', 'stage1'),
    'unfold': (6, 3.2, 2.6, 'unfold keys, values:\n49 C maps each', 'attention'),
    'positions': (6, 4.6, 2.6, 'unfold positions:\n49 d maps', 'attention'),
    'softmax': (9.7, 3.2, 2.2, 'logits, softmax,\nsum', 'attention'),
    'fc': (6, 0.8, 2.6, 'fc: 3N to 9 maps\nof each position', 'convolution'),
    'shift': (9.7, 0.8, 2.2, 'grouped 3x3,\n9 d to C maps', 'convolution'),
    'sum': (13, 2, 1.9, 'rate1 a +\nrate2 c', 'map'),
}
HERE = {
    'x': (0, 2, 1.5, 'input\nC maps', 'map'),
    'qkv': (2.6, 2, 2.2, 'one 1x1\nconvolution', 'stage1'),
    'softmax': (6, 3.2, 5.9, 'keys less positions, logits, softmax, sum:\none pass over 7x7 keys, '
                'no map of its own', 'attention'),
    'shift': (6, 0.8, 5.9, 'grouped 3x3, 3N to N maps, kernels\nW = shift kernels * fc * rate2',
              'convolution'),
    'sum': (13, 2, 1.9, 'rate1 a + c', 'map'),
}  # fmt: skip
LINES = [
    ('x', 'qkv'), ('qkv', 'unfold'), ('positions', 'softmax'), ('unfold', 'softmax'),
    ('qkv', 'fc'), ('fc', 'shift'), ('qkv', 'softmax'), ('qkv', 'shift'),
    ('softmax', 'sum'), ('shift', 'sum'),
]  # fmt: skip
HEIGHT = 0.95


def draw(axes: Axes, title: str, boxes: dict[str, tuple]) -> None:
    for begin, end in LINES:
        # Into a path by its first box.
        skips = begin == 'qkv' and 'fc' in boxes and end in ('softmax', 'shift')
        if begin in boxes and end in boxes and not skips:
            x, y, width, *_ = boxes[begin]
            to_x, to_y, *_ = boxes[end]
            axes.annotate(
                '',
                (to_x - 0.05, to_y),
                (x + width + 0.05, y),
                arrowprops={'arrowstyle': '->', 'color': '#555555', 'lw': 1.2},
            )
    for x, y, width, text, kind in boxes.values():
        box = FancyBboxPatch(
            (x, y - HEIGHT / 2), width, HEIGHT, boxstyle='round,pad=0.04',
            facecolor=COLOURS[kind], edgecolor='#555555',
        )  # fmt: skip
        axes.add_patch(box)
        axes.text(x + width / 2, y, text, ha='center', va='center', fontsize=8.5)
    axes.set_title(title, loc='left', fontsize=10)
    axes.set_xlim(-0.2, 15.1)
    top = max(y for _, y, *_ in boxes.values())
    axes.set_ylim(0.1, top + 0.7)
    axes.set_axis_off()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', type=Path, default=OUTPUT, help='PNG file (default: %(default)s)')
    out = parser.parse_args().out
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(10, 6), height_ratios=[5.2, 3.8], layout='constrained'
    )
    draw(upper, 'As published: Stage I, then attention (orange) and convolution (green)', PUBLISHED)
    draw(lower, 'As computed here: equal, without the large maps', HERE)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    print(f'picture: {out}')


if __name__ == '__main__':
    main()
