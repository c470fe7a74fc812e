"""Train a detector, segmenter or image classifier from a config.

At SIGTERM or SIGUSR1, which schedulers send before they take a machine away, the iteration is
finished, a checkpoint saved, and the exit code is 75; with --resume, training goes on from there as
if nothing had been, bit for bit on a CPU. Without --resume, checkpoints that are in the work
directory already are moved into WORK_DIR/before_TIME.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.runner import Runner, find_latest_checkpoint

from acmix_mm.command_line import (
    Parser,
    add_run_arguments,
    load_run_config,
    positive_int,
    program,
)
from acmix_mm.engine.summary_hook import SUMMARY
from acmix_mm.runs import train
from acmix_mm.schedules import set_length


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint with its optimiser and schedule state; without a value, from '
        'the newest one in the work directory that is whole, if any',
    )
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision; on a CPU, in bfloat16'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real batch size over auto_scale_lr.base_batch_size',
    )
    length = parser.add_mutually_exclusive_group()
    for unit, what in (('epochs', 'epochs'), ('iters', 'iterations')):
        length.add_argument(
            f'--max-{unit}',
            type=positive_int,
            metavar='N',
            help=f'train for N {what}, of a config that counts {what}; warm-up, schedule and the '
            'intervals of validation and checkpoints shrink or grow in proportion',
        )
    return parser.parse_args(argv)


def build_config(args: argparse.Namespace) -> Config:
    """Config with all command-line settings."""
    needs = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    if args.amp:  # before the config is checked: other options may be of that type
        amp = {'optim_wrapper.type': 'AmpOptimWrapper'}
        args.cfg_options = {**amp, **(args.cfg_options or {})}
    cfg = load_run_config(args, needs)
    if args.amp:
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            sys.exit(f'error: --auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    for unit in ('epochs', 'iters'):
        length = getattr(args, f'max_{unit}')
        if length is not None:
            set_length(cfg, length, unit, args.config, f'--max-{unit}')
    if args.resume == 'auto':
        cfg.resume = 'auto'  # train looks for the checkpoint
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    return cfg


@master_only
def report(runner: Runner) -> None:
    """Say what came of it and where the results are."""
    summary = Path(runner.work_dir, SUMMARY)
    print(f'\n{summary.read_text()}')
    print(f'summary:    {summary}')
    print(f'log:        {runner.log_dir}')
    print(f'checkpoint: {find_latest_checkpoint(runner.work_dir)}')


@program
def main(argv: list[str] | None = None) -> None:
    cfg = build_config(parse_args(argv))
    try:
        runner = train(cfg)
    except FloatingPointError as error:
        sys.exit(f'error: {error}')
    report(runner)


if __name__ == '__main__':
    main()
