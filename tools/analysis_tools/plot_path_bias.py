"""Draw how much weight mixed operators give to attention and to convolution, against depth.

Three panels as in figure 5 of the ACmix paper: |rate1| of the attention path, |rate2| of the
convolution path (alpha and beta there), and log |rate1 / rate2|, above 0 where attention has more
weight. Each PATH is a checkpoint, a scalars.json to which PathBiasHook has written, of which the
last values are taken, or a work directory: the newest such log in it or, without one, its newest
checkpoint. PATHs of one label are runs of one model: drawn are their mean and their spread.

The rates scale outputs of different sizes. With --energy, a fourth panel shows what they amount to:
the share of rate1 * attention in the summed mean squares of rate1 * attention and rate2 *
convolution, on images of your choice, by the checkpoints (of work directories, the newest).

The hook is one line in a config: custom_hooks = [dict(type='PathBiasHook', interval=50)].
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from acmix_mm.analysis.images import ImageLoader
from acmix_mm.analysis.path_bias import (
    SPREADS,
    PathEnergy,
    PathRates,
    checkpoint_in,
    path_energy,
    plot_path_bias,
    read_rates,
    same_names,
    table_of,
)
from acmix_mm.analysis.report import align
from acmix_mm.command_line import (
    Parser,
    add_cfg_options,
    build_model,
    check_folder,
    keep_freed_memory,
    load_checkpoint,
    load_config,
    program,
)

EXAMPLES = """
examples:
  plot_path_bias.py work_dirs/demo/retinanet_acmix-r26_fpn_scene-digits --out bias.png
  plot_path_bias.py work_dirs/seed*/ --labels 'ResNet-ACmix 26' --spread std --out bias.png
  plot_path_bias.py epoch_12.pth --energy CONFIG image1.jpg image2.jpg --out bias.png
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('paths', nargs='+', type=Path, metavar='PATH', help='what a run has left')
    parser.add_argument(
        '--labels', nargs='+', metavar='NAME',
        help='one for each PATH, those of equal labels are one group; or one for all '
        '(default: the names of the PATHs)',
    )  # fmt: skip
    parser.add_argument(
        '--spread', choices=SPREADS, default='range',
        help='of several runs: from the smallest to the largest value, or one standard deviation '
        'to both sides (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--energy', nargs='+', metavar=('CONFIG', 'IMAGE'),
        help='config of the checkpoints, and images',
    )  # fmt: skip
    add_cfg_options(parser)
    parser.add_argument('--out', type=Path, required=True, metavar='FILE.png', help='the picture')
    args = parser.parse_args(argv)
    args.labels = args.labels or [path.resolve().name for path in args.paths]
    if len(args.labels) == 1:
        args.labels *= len(args.paths)
    if len(args.labels) != len(args.paths):
        parser.error(
            f'argument --labels: must be one, or one for each of {len(args.paths)} paths, got '
            f'{len(args.labels)}'
        )
    if args.energy is not None and len(args.energy) < 2:
        parser.error('argument --energy: must be a config and at least one image')
    if args.out.suffix != '.png':
        parser.error(f'argument --out: must end in .png, got {args.out}')
    return args


def read_groups(args: argparse.Namespace) -> dict[str, list[list[PathRates]]]:
    """Rates of the runs by label; says where they are from."""
    groups: dict[str, list[list[PathRates]]] = {}
    for label, path in zip(args.labels, args.paths, strict=True):
        rates, file = read_rates(path)
        print(f'{label}: {file}')
        groups.setdefault(label, []).append(rates)
    for label, runs in groups.items():
        same_names(label, runs)
    return groups


def measure_energies(args: argparse.Namespace) -> dict[str, list[list[PathEnergy]]]:
    """Energies of the runs by label, on the images."""
    config, *images = args.energy
    cfg = load_config(config, args.cfg_options)
    keep_freed_memory()
    energies: dict[str, list[list[PathEnergy]]] = {}
    with tqdm(total=len(args.paths) * len(images), desc='energy', unit='image') as bar:
        for label, path in zip(args.labels, args.paths, strict=True):
            if path.suffix == '.json':
                sys.exit(f'error: --energy needs checkpoints or work directories, got log {path}')
            file = str(checkpoint_in(path))
            names = argparse.Namespace(config=config, checkpoint=file)
            model = build_model(cfg, load_checkpoint(file), names)
            loader = ImageLoader(cfg, model)
            batches = [loader.load(Path(image))[0] for image in images]

            def run(model=model, batches=batches) -> None:
                for data in batches:
                    model.test_step(data)
                    bar.update()

            energies.setdefault(label, []).append(path_energy(model, run))
    return energies


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_folder(args.out.parent)
    groups = read_groups(args)
    energies = measure_energies(args) if args.energy else None
    plot_path_bias(groups, args.out, energies, args.spread)
    for label, runs in groups.items():
        mean = f', mean of {len(runs)} runs' if len(runs) > 1 else ''
        print(f'\n{label}{mean}', *align(table_of(runs, energies and energies[label])), sep='\n')
    print(f'\npicture: {args.out}')


if __name__ == '__main__':
    main()
