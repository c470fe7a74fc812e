"""Train configs alike, with several seeds each, and compare accuracy with cost.

Every config is trained with every seed for the same budget, with the optimiser and schedule that it
has, and evaluated on its validation data after the last epoch. Out come OUT.csv with a line for
each run, OUT.md with a table, and OUT.png: accuracy against FLOPs, parameters and time per image.

Budget: --max-epochs, for all configs. Where a learning-rate schedule counts epochs, it is scaled in
proportion, to whole epochs; a warm-up that counts iterations stays as it is. For less than an
epoch, give fewer images: --cfg-options train_dataloader.dataset.indices=600. Configs must agree in
epochs, batch size and data.

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
import contextlib
import hashlib
import io
import signal
import sys
from pathlib import Path

import torch

from acmix_mm.analysis.comparison import (
    Model,
    Run,
    check_all_starts,
    check_budget,
    check_data,
    check_metrics,
    check_results,
    csv_text,
    markdown,
    measure_costs,
    plot,
    prepare,
    table,
    train_all,
    write,
)
from acmix_mm.analysis.report import align
from acmix_mm.command_line import (
    WORK_DIRS,
    Parser,
    add_cfg_options,
    keep_freed_memory,
    positive_int,
    program,
)

EXAMPLES = """
examples:
  compare.py configs/demo/retinanet_{r26,acmix-r26}_fpn_scene-digits.py --seeds 0 1 2 --jobs 2
  compare.py configs/demo/retinanet_{r26,acmix-r26}_fpn_scene-digits.py \\
      --labels 'ResNet 26' 'ResNet-ACmix 26' --max-epochs 2 --out docs/comparison
  compare.py configs/demo/acmix-{pvt_fpn,swin_upernet}_scene-digits.py --metric mIoU aAcc
"""


# Options.


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
        '--metric', nargs='+', default=['coco/bbox_mAP_50', 'coco/bbox_mAP'], metavar='NAME',
        help='results of the evaluation to report, the first of them in the plot '
        '(default: coco/bbox_mAP_50 coco/bbox_mAP)',
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
        help='write PATH.csv, PATH.md and PATH.png (default: WORK_DIR/comparison)',
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.labels = args.labels or [Path(file).stem for file in args.configs]
    if len(args.labels) != len(args.configs):
        parser.error(
            f'argument --labels: must be one for each of {len(args.configs)} configs, got '
            f'{len(args.labels)}'
        )
    files = [Path(file).resolve() for file in args.configs]
    for name, values, shown in (
        ('CONFIG', files, args.configs),
        ('--labels', args.labels, args.labels),
        ('--seeds', args.seeds, args.seeds),
        ('--metric', args.metric, args.metric),
    ):
        for index, value in enumerate(values):
            if value in values[:index]:
                parser.error(f'argument {name}: must differ, got {shown[index]} twice')
    if args.jobs > args.threads:
        parser.error(
            f'argument --jobs: must be at most the number of threads, {args.threads}, got '
            f'{args.jobs}'
        )
    args.out = args.out or args.work_dir / 'comparison'
    args.device = 'cuda' if torch.cuda.is_available() else 'cpu'  # as training chooses
    return args


def make_models(args: argparse.Namespace) -> list[Model]:
    """The configs as they will be trained; exits with a message if they cannot be compared."""
    configs = {file: prepare(file, args.cfg_options, args.max_epochs) for file in args.configs}
    check_budget(configs)
    check_data(configs)
    check_metrics(configs, args.metric)
    models = []
    for label, (file, cfg) in zip(args.labels, configs.items(), strict=True):
        key = hashlib.sha256(cfg.pretty_text.encode()).hexdigest()[:8]
        folder = args.work_dir / f'{Path(file).stem}-{key}'
        for model in models:
            if model.folder == folder:
                sys.exit(f'error: configs must differ, {model.file} and {file} are the same')
        models.append(Model(label, file, cfg, folder))
    for model in models:
        write(Path(model.config), model.cfg.pretty_text)
    return models


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    models = make_models(args)
    check_results(args.out)
    runs = [Run(model, seed) for seed in args.seeds for model in models]
    check_all_starts([m for m in models if any(r.model is m and r.metrics() is None for r in runs)])
    problems = train_all(runs, args.metric, args.jobs, args.threads // args.jobs)
    failures = [f'{run}: {problem} (log: {run.log})' for run, problem in problems.items()]

    finished = [Run(m, s) for m in models for s in args.seeds if Run(m, s) not in problems]
    if finished:
        torch.set_num_threads(args.threads)
        keep_freed_memory()
        first = {run.model: run for run in reversed(finished)}
        with contextlib.redirect_stdout(io.StringIO()):  # COCO's API talks
            costs, more = measure_costs([first[m] for m in models if m in first], args.device)
        failures += more
        command = sys.argv[1:] if argv is None else argv
        write(Path(f'{args.out}.csv'), csv_text(finished, costs, args.metric))
        write(Path(f'{args.out}.md'), markdown(finished, costs, args, command))
        plot(finished, costs, args)
        header, rows = table(finished, costs, args)
        print('', *align([tuple(header), *map(tuple, rows)]), '', sep='\n')
        for what, suffix in (('table', 'md'), ('runs', 'csv'), ('plot', 'png')):
            print(f'{what + ":":11}{args.out}.{suffix}')
        print(f'logs:      {args.work_dir}')
    if failures:
        sys.exit('\n'.join(['failed:', *(f'  {line}' for line in failures)]))


if __name__ == '__main__':
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: sys.exit('stopped; the same command goes on from here'))
    main()
