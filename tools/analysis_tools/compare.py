"""Train configs alike, with several seeds each, and compare accuracy with cost.

Every config is trained with every seed for the same budget, with the optimiser and schedule that it
has, and evaluated on its validation data after the last epoch. Out come OUT.md with a table,
OUT.csv with a line for each run, OUT.json with all of it, and OUT.png: accuracy against costs.
Means have 95 % confidence intervals (Student's t), and so have the differences to the first config,
which are taken between runs of the same seed.

Budget: --max-epochs, for all configs. Where a learning-rate schedule counts epochs, it is scaled in
proportion, to whole epochs; a warm-up that counts iterations stays as it is. For less than an
epoch, give fewer images: --cfg-options train_dataloader.dataset.indices=600. Configs must agree in
epochs, batch size and data.

Learning rates: with --rate-factors 0.33 1 3, every config is first trained once with each of these
multiples of its own rate, optim_wrapper.optimizer.lr, and with a seed that is not one of --seeds.
The multiple with the best first metric is then taken for all seeds, of equal ones that next to 1.
Least rates of schedules, such as eta_min, stay. A run whose loss is not finite is a result, not a
failure. Where the best is the smallest or the largest multiple, the table says so: a better rate
may lie outside.

Runs: in WORK_DIR/CONFIG-KEY/seedN, where KEY stands for the text of the config, options and budget
included. The same command again repeats no finished run and goes on with interrupted ones, from
their newest checkpoint; a config that has changed gets a new folder. Changes of data or of code are
not noticed: remove the folder then. A run that fails is reported at the end with its log, the
others go on, and the exit status is 1.

Costs are measured after all training, with nothing else running, for the model of the first seed:
multiplications of one prediction; times of all models in turns, as benchmark.py takes them, for
'forward' the prediction of one image, for 'train' forward and backward pass of a batch, by the
number of its images.
"""

import argparse
import signal
import sys
from pathlib import Path

import torch

from acmix_mm.analysis.comparison import METRICS, SEARCH_SEED, compare
from acmix_mm.analysis.comparison_report import (
    COSTS,
    DEFAULT_COSTS,
    report,
    with_results,
    write_report,
)
from acmix_mm.command_line import (
    WORK_DIRS,
    Parser,
    add_cfg_options,
    check_folder,
    nearest_existing,
    positive_float,
    positive_int,
    program,
)

EXAMPLES = """
examples:
  compare.py configs/demo/retinanet_{r26,acmix-r26}_fpn_scene-digits.py --seeds 0 1 2 --jobs 2
  compare.py configs/demo/retinanet_{r26,acmix-r26}_fpn_scene-digits.py \\
      --labels 'ResNet 26' 'ResNet-ACmix 26' --max-epochs 2 --out docs/comparison
  compare.py configs/demo/retinanet_{r26,acmix-swin-t}_fpn_scene-digits.py \\
      --rate-factors 0.1 0.33 1 --search-epochs 2 --seeds 0 1 2 3 4
  compare.py configs/demo/acmix-{pvt_fpn,swin_upernet}_scene-digits.py --metric mIoU aAcc
"""


def seed_type(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f'{text!r} is not an integer from 0 to 2^32 - 1')
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('configs', nargs='+', metavar='CONFIG', help='config file')
    parser.add_argument(
        '--labels', nargs='+', metavar='NAME',
        help='what to call the configs, one each (default: the names of their files)',
    )  # fmt: skip
    parser.add_argument(
        '--seeds', nargs='+', type=seed_type, default=[0, 1, 2], metavar='N', help='default: 0 1 2'
    )
    parser.add_argument(
        '--max-epochs', type=positive_int, metavar='N',
        help="epochs to train, with schedules scaled (default: the configs')",
    )  # fmt: skip
    add_cfg_options(parser)
    parser.add_argument(
        '--metric', nargs='+', default=METRICS, metavar='NAME', dest='metrics',
        help='results of the evaluation to report, the first of them in the plot '
        f'(default: {" ".join(METRICS)})',
    )  # fmt: skip
    parser.add_argument(
        '--rate-factors', nargs='+', type=positive_float, default=(), metavar='X',
        help="multiples of each config's learning rate to choose from (default: no search)",
    )  # fmt: skip
    parser.add_argument(
        '--search-epochs', type=positive_int, metavar='N',
        help='epochs of a run of the search (default: those of all runs)',
    )  # fmt: skip
    parser.add_argument(
        '--search-seed', type=seed_type, default=SEARCH_SEED, metavar='N',
        help='seed of the search (%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--cost', nargs='+', choices=[*COSTS, 'all'], default=DEFAULT_COSTS, dest='costs',
        help=f'what the plot shows accuracy against (default: {" ".join(DEFAULT_COSTS)})',
    )  # fmt: skip
    parser.add_argument(
        '--jobs', type=positive_int, default=1, metavar='N',
        help='runs at a time; each gets its share of the threads (%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--threads', type=positive_int, default=torch.get_num_threads(), metavar='N',
        help='CPU threads, of all runs together and for the measurement of time (%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--work-dir', type=Path, default=Path(WORK_DIRS, 'compare'), help='default: %(default)s'
    )
    parser.add_argument(
        '--out', type=Path, metavar='PATH',
        help='write PATH.md, .csv, .json and .png (default: WORK_DIR/comparison)',
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.out = args.out or args.work_dir / 'comparison'
    args.costs = COSTS if 'all' in args.costs else list(dict.fromkeys(args.costs))
    return args


def check_out(out: Path) -> None:
    """Exits with a message unless the results can be written, hours later."""
    check_folder(nearest_existing(out.parent))
    for file in (Path(f'{out}.{suffix}') for suffix in ('md', 'csv', 'json', 'png')):
        if file.is_dir():
            sys.exit(f'error: --out {out}: {file} is a folder')


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args.out)
    comparison = compare(
        args.configs,
        labels=args.labels,
        seeds=args.seeds,
        max_epochs=args.max_epochs,
        options=args.cfg_options,
        metrics=args.metrics,
        rate_factors=args.rate_factors,
        search_epochs=args.search_epochs,
        search_seed=args.search_seed,
        jobs=args.jobs,
        threads=args.threads,
        work_dir=args.work_dir,
    )
    if with_results(comparison):
        write_report(comparison, args.out, args.costs, sys.argv[1:] if argv is None else argv)
        print(*report(comparison), '', sep='\n')
        for what, suffix in (('table', 'md'), ('runs', 'csv'), ('all', 'json'), ('plot', 'png')):
            print(f'{what + ":":11}{args.out}.{suffix}')
        print(f'logs:      {args.work_dir}')
    if comparison.failures:
        sys.exit('\n'.join(['failed:', *(f'  {line}' for line in comparison.failures)]))


if __name__ == '__main__':
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: sys.exit('stopped; the same command goes on from here'))
    main()
