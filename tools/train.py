"""Train a detector, segmenter or image classifier from a config.

At SIGTERM or SIGUSR1, which schedulers send before they take a machine away, the iteration is
finished, a checkpoint saved, and the exit code is 75; with --resume, training goes on from there as
if nothing had been, bit for bit on a CPU. Without --resume, checkpoints that are in the work
directory already are moved into WORK_DIR/before_TIME.
"""

import argparse
import contextlib
import functools
import os
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import master_only
from mmengine.runner import Runner, find_latest_checkpoint

from acmix_mm.command_line import (
    Parser,
    add_run_arguments,
    join_processes,
    keep_freed_memory,
    load_run_config,
    once,
    program,
)
from acmix_mm.data_check import check_data
from acmix_mm.engine import newest_checkpoint, protect, set_aside, use_bfloat16
from acmix_mm.files import FolderInUse, claim
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
    if args.resume == 'auto':
        cfg.resume = 'auto'  # check_start looks for the checkpoint
    elif args.resume is not None:
        cfg.resume, cfg.load_from = True, args.resume
    return cfg


def check_start(cfg: Config, claimed: contextlib.ExitStack) -> None:
    """Read what training starts from, and claim the work directory.

    For one process of a job; what it changes in the config, all get. Exits with a message if there
    is no start.
    """
    resolve_weights(cfg)
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    out_dir, template = saving.get('out_dir'), saving.get('filename_tmpl')
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # after a process ended
    search = cfg.get('resume') == 'auto' or (cfg.get('resume') and cfg.get('load_from') is None)
    if search or restarted:
        try:
            newest = newest_checkpoint(cfg.work_dir, out_dir)
        except ValueError as error:
            sys.exit(f'error: --resume: {error}')
        if newest is not None:
            cfg.resume, cfg.load_from = True, newest
            print(f'training goes on from {newest}')
        elif search:
            cfg.resume = False
            print(f'training begins: {cfg.work_dir} has no checkpoint to go on from')
    if get_device() == 'cpu' and use_bfloat16(cfg):
        print('mixed precision on a CPU: forward passes in bfloat16, no loss scale')
    check_starts(cfg)
    check_data(cfg, ['train', 'val'])
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    try:
        claimed.enter_context(claim(cfg.work_dir))
    except FolderInUse as error:
        sys.exit(f'error: {error}')
    start = cfg.load_from if cfg.get('resume') else None
    moved = set_aside(cfg.work_dir, start, out_dir, template)
    for old, new in moved.items():
        print(f'checkpoint of an earlier run: {old} is {new} now')
        if cfg.get('load_from') and Path(cfg.load_from).absolute() == old.absolute():
            cfg.load_from = str(new)


@master_only
def report(runner: Runner) -> None:
    """Say where the results are."""
    print(f'log:        {runner.log_dir}')
    print(f'checkpoint: {find_latest_checkpoint(runner.work_dir)}')


@program
def main(argv: list[str] | None = None) -> None:
    cfg = build_config(parse_args(argv))
    join_processes(cfg)
    with contextlib.ExitStack() as claimed:
        cfg = once(functools.partial(check_start, claimed=claimed), cfg)
        keep_freed_memory()
        protect(cfg)
        runner = Runner.from_cfg(cfg)
        try:
            runner.train()
        except FloatingPointError as error:
            sys.exit(f'error: {error}')
        report(runner)


if __name__ == '__main__':
    main()
