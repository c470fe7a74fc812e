"""Evaluate a detector, segmenter or image classifier from a config and a checkpoint."""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from acmix_mm.command_line import (
    add_run_arguments,
    join_processes,
    keep_freed_memory,
    load_checkpoint,
    load_run_config,
    once,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', metavar='FILE.pkl', help='dump the predictions for later use')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument(
        '--show-dir',
        help='draw the predictions into this folder, below work directory and time stamp',
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds a window stays (default: %(default)s)'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation with the config's tta_model and tta_pipeline",
    )
    args = parser.parse_args(argv)
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out must end in .pkl or .pickle, got {args.out}')
    return args


def build_config(args: argparse.Namespace) -> Config:
    """Config with all command-line settings."""
    cfg = load_run_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        hook = cfg.get('default_hooks', {}).get('visualization')
        if hook is None:
            sys.exit(f'error: --show: {args.config} has no default_hooks.visualization')
        hook.update(show=args.show, wait_time=args.wait_time)
        if hook.type == 'VisualizationHook':  # mmpretrain's
            hook.update(enable=True, interval=1)
        else:
            hook.draw = True
        # The two that have no folder of their own, or none below the time stamp.
        if args.show_dir and hook.type in ('SegVisualizationHook', 'VisualizationHook'):
            for backend in cfg.visualizer.vis_backends:
                if backend.type == 'LocalVisBackend':
                    # Below the time stamp's vis_data.
                    backend.img_save_dir = str(Path('..', args.show_dir))
        elif args.show_dir:
            hook.test_out_dir = args.show_dir
    if args.tta:
        for key in ('tta_model', 'tta_pipeline'):
            if key not in cfg:
                sys.exit(f'error: --tta: {args.config} has no {key}')
        cfg.model = dict(cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    return cfg


@master_only
def report(runner: Runner, args: argparse.Namespace, metrics: dict[str, float]) -> None:
    """Say the metrics and where the results are."""
    for name, value in metrics.items():
        print(f'{name}: {value:g}')
    print(f'log:         {runner.log_dir}')
    if args.show_dir:
        print(f'pictures:    {Path(runner.log_dir) / args.show_dir}')
    if args.out:
        print(f'predictions: {args.out}')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = build_config(args)
    join_processes(cfg)
    cfg = once(lambda cfg: load_checkpoint(cfg.load_from), cfg)
    keep_freed_memory()
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    runner = Runner.from_cfg(cfg)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    report(runner, args, runner.test())


if __name__ == '__main__':
    main()
