"""Evaluate a detector, segmenter or image classifier from a config and a checkpoint."""

import argparse
import shutil
import sys
from pathlib import Path

import mmengine
from mmengine.config import Config
from mmengine.dist import master_only
from mmengine.evaluator import DumpResults
from mmengine.runner import Runner

from acmix_mm.command_line import (
    Parser,
    add_run_arguments,
    check_folder,
    load_run_config,
    nearest_existing,
    program,
)
from acmix_mm.config_check import setting
from acmix_mm.files import naming, part_of, whole_file
from acmix_mm.runs import evaluators_of, prepare_test


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        'checkpoint', help='checkpoint file, or ONNX file of tools/deploy/export_model.py'
    )
    parser.add_argument(
        '--out',
        metavar='FILE.pkl|FOLDER',
        help='where to write the predictions: of a detector or classifier a pickle, which the '
        'tools of MMDetection or MMPretrain read, of a segmentor a folder of PNG label maps in the '
        "data set's own numbering",
    )
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
        help="test-time augmentation with the config's tta_model and tta_pipeline; a detector's "
        'default is to merge the boxes of the image and of its mirror image; masks are left out',
    )
    return parser.parse_args(argv)


def build_config(args: argparse.Namespace) -> Config:
    """Config with all command-line settings."""
    needs = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    cfg = load_run_config(args, needs)
    if args.show or args.show_dir:
        hook = cfg.get('default_hooks', {}).get('visualization')
        if hook is None:
            sys.exit(f'error: --show: {args.config} has no default_hooks.visualization')
        hook.update(show=args.show, wait_time=args.wait_time)
        if setting(cfg, 'visualizer.type') == 'SegLocalVisualizer':
            cfg.visualizer.type = 'SegmentationVisualizer'
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
    if args.out is not None:
        check_out(cfg, args)
    return cfg


def check_out(cfg: Config, args: argparse.Namespace) -> None:
    """Exits with a message unless ``--out`` fits the task and can be written, hours later.

    A segmentor's metric writes it, one label map after the other, to a hidden folder beside it.
    """
    out = Path(args.out)
    is_pickle = args.out.endswith(('.pkl', '.pickle'))
    if cfg.get('default_scope') != 'mmseg':
        if not is_pickle:
            sys.exit(f'error: --out must end in .pkl or .pickle, got {args.out}')
        if out.is_dir():
            sys.exit(f'error: --out {out} is a folder')
        check_folder(nearest_existing(out.parent))
        return
    if is_pickle or Path(args.out).is_file():
        sys.exit(f"error: --out must be a folder for a segmentor's label maps, got {args.out}")
    metrics = [evaluator for evaluator in evaluators_of(cfg) if evaluator.type == 'IoUMetric']
    if not metrics:
        sys.exit(f'error: --out: {args.config} has no IoUMetric in test_evaluator')
    check_folder(nearest_existing(out))
    shutil.rmtree(part_of(out.absolute()), ignore_errors=True)  # of a process that was killed
    metrics[0].output_dir = str(part_of(out.absolute()))


@master_only
def gather_label_maps(out: Path) -> None:
    """Give label maps their place, in which those of an earlier run may be."""
    out.mkdir(exist_ok=True)
    for file in part_of(out.absolute()).iterdir():
        file.replace(out / file.name)
    part_of(out.absolute()).rmdir()


def dump_of(cfg: Config, args: argparse.Namespace) -> DumpResults | None:
    """The metric that writes predictions, of a detector with masks as run lengths."""
    if args.out is None or cfg.get('default_scope') == 'mmseg':
        return None
    if cfg.get('default_scope') == 'mmdet':
        from mmdet.evaluation import DumpDetResults as Dump
    else:
        Dump = DumpResults

    class WholeDump(Dump):
        """The metric, with a file that is whole or absent."""

        def compute_metrics(self, results: list) -> dict:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(args.out) as part:
                mmengine.dump(results, part)
            return {}

    return WholeDump(out_file_path=args.out)


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


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = build_config(args)
    runner = prepare_test(cfg, args.checkpoint, args.tta)
    dump = dump_of(cfg, args)
    if dump is not None:
        runner.test_evaluator.metrics.append(dump)
    with naming(args.out or cfg.work_dir):
        metrics = runner.test()
    if args.out is not None and dump is None:
        gather_label_maps(Path(args.out))
    report(runner, args, metrics)


if __name__ == '__main__':
    main()
