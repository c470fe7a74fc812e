"""Show what the mixed operators of a trained model look at in an image.

Written to --out-dir:
  attention_xX_yY.png  for each of --points: the attention weights of that pixel's position, a row
                       for each layer, a column for each head
  paths.png            what each path adds to a layer's output at every position, and the attention
                       path's share
  shift_kernels.png    learned shift kernels of the convolution path beside the shifts where
                       training starts by default (not where kernels are not learned)
  attention.html       one page, without anything else, to explore the weights of all positions by
                       layer and head; it has paths.png and shift_kernels.png in it

Points are pixels of the image, from 0,0 at the top left. Each is taken to the map of each layer
through the test pipeline's resizing, cropping and padding: a position of a map stands for its share
of the network's input. Files of an earlier run with the same names are replaced.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from acmix_mm.analysis.attention import (
    Attention,
    ShiftKernels,
    attending_operators,
    attentions_of,
    check_names,
    default_names,
    shift_kernels,
)
from acmix_mm.analysis.attention_figures import plot_attention, plot_paths, plot_shift_kernels
from acmix_mm.analysis.attention_page import write_page
from acmix_mm.analysis.images import Frame, ImageLoader, read_rgb
from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    build_model,
    check_folder,
    device_type,
    keep_freed_memory,
    load_checkpoint,
    load_config,
    nearest_existing,
    program,
)

PAGE, PATHS, KERNELS = 'attention.html', 'paths.png', 'shift_kernels.png'
EXAMPLES = """
example:
  visualize_attention.py IMAGE.jpg CONFIG CHECKPOINT --points 60,40 20,70 --out-dir attention
  visualize_attention.py ... --layers backbone.layer3.3.conv2 backbone.layer4.0.conv2
"""


def point_type(text: str) -> tuple[int, int]:
    if not re.fullmatch(r'\d+,\d+', text):
        raise argparse.ArgumentTypeError(f'{text!r} is not X,Y with two integers from 0')
    x, y = map(int, text.split(','))
    return x, y


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('image', type=Path, help='image file')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--points', nargs='+', type=point_type, required=True, metavar='X,Y', help='pixels'
    )
    parser.add_argument(
        '--layers', nargs='+', metavar='NAME',
        help='names of mixed operators, or all (default: the last one of each stage)',
    )  # fmt: skip
    parser.add_argument('--out-dir', type=Path, required=True, help='folder for the results')
    parser.add_argument(
        '--device', type=device_type, help='cpu, cuda or cuda:N (default: GPU if present)'
    )
    return parser.parse_args(argv)


def choose(attentions: list[Attention], args: argparse.Namespace) -> list[Attention]:
    """The layers that are to be shown."""
    if args.layers == ['all']:
        return attentions
    names = args.layers or default_names(attentions)
    return [attention for attention in attentions if attention.name in names]


def read_image(args: argparse.Namespace) -> np.ndarray:
    """The image; exits with a message if it would be overwritten, or the points are not in it."""
    image = read_rgb(args.image)
    height, width = image.shape[:2]
    for point in args.points:
        Frame((height, width), (height, width), (height, width)).cell(*point, (height, width))
    names = (PAGE, PATHS, KERNELS, *map(picture_of, args.points))
    if args.image.resolve() in [(args.out_dir / name).resolve() for name in names]:
        sys.exit(f'error: --out-dir {args.out_dir}: {args.image} would be overwritten')
    return image


def picture_of(point: tuple[int, int]) -> str:
    return f'attention_x{point[0]}_y{point[1]}.png'


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder(nearest_existing(args.out_dir))
    image = read_image(args)
    cfg = load_config(args.config, args.cfg_options)
    checkpoint = load_checkpoint(args.checkpoint)
    keep_freed_memory()
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    model = build_model(cfg, checkpoint, args).to(device)
    if args.layers not in (None, ['all']):
        check_names(args.layers, attending_operators(model))
    data, frame = ImageLoader(cfg, model).load(args.image)
    for point in args.points:
        frame.cell(*point, frame.input)
    everything = attentions_of(model, lambda: model.test_step(data))
    attentions = choose(everything, args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    drawing = (attentions, image, frame)
    figures: list[tuple[str, str, Path]] = []

    def draw_point(point: tuple[int, int]) -> None:
        plot_attention(*drawing, point, args.out_dir / picture_of(point))

    def draw_page() -> None:
        title = f'Attention of {Path(args.config).stem} on {args.image.name}'
        page = args.out_dir / PAGE
        write_page(*drawing, args.points[0], title, len(everything), figures, page)

    steps = {picture_of(point): partial(draw_point, point) for point in args.points}
    steps[PATHS] = lambda: figures.append(draw_paths(*drawing, args.out_dir / PATHS))
    kernels = {a.name: k for a in attentions for k in [shift_kernels(a.operator)] if k}
    if kernels:
        steps[KERNELS] = lambda: figures.append(draw_kernels(kernels, args.out_dir / KERNELS))
    steps[PAGE] = draw_page
    with tqdm(steps.items(), unit='file') as bar:
        for name, write in bar:
            bar.set_description(name)
            write()
    print(f'layers:   {", ".join(a.name for a in attentions)}')
    left = [a.name for a in everything if a not in attentions]
    if left:
        print(f'          not shown: {", ".join(left)} (--layers all shows all)')
    print(f'pictures: {args.out_dir}')
    page = args.out_dir / PAGE
    print(f'page:     {page} ({page.stat().st_size / 2**20:.1f} MiB)')


def draw_paths(
    attentions: Sequence[Attention], image: np.ndarray, frame: Frame, file: Path
) -> tuple[str, str, Path]:
    """The figure, with what the page says of it."""
    plot_paths(attentions, image, frame, file)
    return (
        'What each path adds',
        'The output of a mixed operator is rate1 * attention + rate2 * convolution. The first '
        'three maps show the size of both terms and of their sum, as root mean squares over '
        "channels, in one scale; the last one the attention path's share of the two mean squares: "
        'orange where attention adds more, violet where convolution does.',
        file,
    )


def draw_kernels(kernels: Mapping[str, ShiftKernels], file: Path) -> tuple[str, str, Path]:
    """The figure, with what the page says of it."""
    plot_shift_kernels(kernels, file)
    return (
        'Shift kernels',
        'The convolution path shifts maps by convolutions whose kernels are learned. By default '
        'training starts with a 1 at the position from which each shifts. Beside that: the learned '
        'kernels, what has changed, and the kernels with the layer fc in them, which take the maps '
        'of query, key and value of each head.',
        file,
    )


if __name__ == '__main__':
    main()
