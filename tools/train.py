"""Train a detector, segmenter or image classifier from a config."""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.runner import Runner, find_latest_checkpoint

from acmix_mm.command_line import (
    Parser,
    add_run_arguments,
    join_processes,
    keep_freed_memory,
    load_checkpoint,
    load_run_config,
    once,
    program,
)
from acmix_mm.weights import check_starts, resolve_weights


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint with its optimiser and schedule state; without a value, from '
        'the latest one in the work directory, if any',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the real batch size over auto_scale_lr.base_batch_size',
    )
    return parser.parse_args(argv)


def build_config(args: argparse.Namespace) -> Config:
    """Config with all command-line settings."""
    cfg = load_run_config(args)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            sys.exit(f'error: --auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume, cfg.load_from = True, None if args.resume == 'auto' else args.resume
    return cfg


def check_start(cfg: Config) -> None:
    """Read what training starts from; exits with a message if it cannot be had.

    For one process of a job; what it changes in the config, all get.
    """
    resolve_weights(cfg)
    if cfg.get('resume') and cfg.get('load_from') is None:
        latest = find_latest_checkpoint(cfg.work_dir)
        if latest is not None:
            load_checkpoint(latest)
    check_starts(cfg)


@master_only
def report(runner: Runner) -> None:
    """Say where the results are."""
    print(f'log:        {runner.log_dir}')
    print(f'checkpoint: {find_latest_checkpoint(runner.work_dir)}')


@program
def main(argv: list[str] | None = None) -> None:
    cfg = build_config(parse_args(argv))
    join_processes(cfg)
    cfg = once(check_start, cfg)
    keep_freed_memory()
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    runner = Runner.from_cfg(cfg)
    runner.train()
    report(runner)


if __name__ == '__main__':
    main()
