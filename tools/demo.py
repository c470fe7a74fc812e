"""Show the whole way on a small real data set, on a CPU, in some minutes.

Makes scene digits, trains a model on it, evaluates it, and draws a grid of its predictions on
validation images, whose digits and photographs it has not seen. The classifier is of images with a
single digit; its weights are also put where the detector with --pretrained looks for them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from pycocotools import mask as coco_mask

from acmix_mm.command_line import Parser, load_config, program
from acmix_mm.config_check import setting
from acmix_mm.files import claim, encode_picture, write_whole

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent  # of the configs, here or in an installed package
DATA = Path('data/scene_digits')
COLUMNS, ROWS = 6, 4
SCORE_THR = 0.6
ENLARGE = 2  # the images are small; drawn labels need room
PRETRAINED = 'configs/demo/retinanet_acmix-r26-pre_fpn_scene-digits.py'


def run(title: str, *command: str) -> None:
    """Run a program beside this one, its output on the terminal."""
    command = (os.path.relpath(TOOLS / command[0]), *command[1:])
    print(f'\n== {title}: python {" ".join(command)}', flush=True)
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(f'error: {command[0]} failed with exit code {code}')


def enlarge(image: np.ndarray, interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """An image, label map or mask at ``ENLARGE`` times its size."""
    return cv2.resize(image, None, fx=ENLARGE, fy=ENLARGE, interpolation=interpolation)


def draw_detections(image: np.ndarray, entry: dict, meta: dict, folder: Path) -> np.ndarray:
    """Predicted boxes, and masks if any, with classes and scores on an enlarged RGB image."""
    rows = entry['predictions']
    instances = InstanceData(
        bboxes=np.array([r['bbox'] for r in rows]).reshape(-1, 4) * ENLARGE,
        labels=np.array([r['label'] for r in rows], int),
        scores=np.array([r['score'] for r in rows]),
    )
    if rows and 'mask' in rows[0]:
        instances.masks = np.stack([enlarge(coco_mask.decode(r['mask'])) for r in rows]) > 0
    visualizer = DetLocalVisualizer(line_width=2)
    visualizer.dataset_meta = {'palette': 'random', **meta}
    sample = DetDataSample(pred_instances=instances)
    visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=0)
    return visualizer.get_image()


def draw_label_map(image: np.ndarray, entry: dict, meta: dict, folder: Path) -> np.ndarray:
    """The predicted classes in their colours over an enlarged RGB image."""
    label_map = enlarge(cv2.imread(str(folder / entry['label_map']), cv2.IMREAD_UNCHANGED))
    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = meta
    sample = SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(label_map)[None]))
    visualizer.add_datasample('', image, sample, draw_gt=False)
    return visualizer.get_image()


def draw_class(image: np.ndarray, entry: dict, meta: dict, folder: Path) -> np.ndarray:
    """The best class and its score below an enlarged RGB image, in red where it is wrong."""
    best = entry['predictions'][0]
    right = entry['image'].startswith(f'{best["category"]}_')
    strip = np.full((24, image.shape[1], 3), 255, np.uint8)
    cv2.putText(
        strip, f'{best["category"]}: {best["score"]:.2f}', (4, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.6,
        (0, 0, 0) if right else (220, 0, 0), 1, cv2.LINE_AA,
    )  # fmt: skip
    return np.vstack([image, strip])


def gather(images: Path, folder: Path) -> None:
    """Copy a few images of every class folder to one folder, the class before their names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    classes = sorted(images.iterdir())
    for index, name in enumerate(classes):
        count = len(range(index, COLUMNS * ROWS, len(classes)))  # as many as fill the grid
        for file in sorted(name.iterdir())[:count]:
            shutil.copyfile(file, folder / f'{name.name}_{file.name}')


@dataclass(frozen=True)
class Task:
    """What differs between the demos.

    Args:
        config: Config to train.
        images: Validation images, below the data set's folder.
        metrics: Metrics to report: what to call them, and their keys in the log of the test.
        draw: Draws an entry of predictions.json on an image.
        options: ``--cfg-options`` for the pictures.
    """

    config: str
    images: str
    metrics: dict[str, str]
    draw: Callable[[np.ndarray, dict, dict, Path], np.ndarray]
    options: tuple[str, ...] = ()


TASKS = {
    'classification': Task(
        'configs/demo/acmix-r26_scene-digits.py',
        'imagenet/val',
        {'top-1 (%)': 'accuracy/top1', 'top-5 (%)': 'accuracy/top5'},
        draw_class,
    ),
    'detection': Task(
        'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py',
        'coco/val2017',
        {'box mAP': 'coco/bbox_mAP', 'box AP50': 'coco/bbox_mAP_50'},
        draw_detections,
        # To look at, one class a box; the metrics rank all of them.
        ('model.test_cfg.nms.class_agnostic=True',),
    ),
    'instance': Task(
        'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py',
        'coco/val2017',
        {
            'box mAP': 'coco/bbox_mAP',
            'box AP50': 'coco/bbox_mAP_50',
            'mask mAP': 'coco/segm_mAP',
            'mask AP50': 'coco/segm_mAP_50',
        },
        draw_detections,
        ('model.test_cfg.rcnn.nms.class_agnostic=True',),
    ),
    'semantic': Task(
        'configs/demo/acmix-swin_upernet_scene-digits.py',
        'ade/images/validation',
        {'mIoU (%)': 'mIoU', 'pixel accuracy (%)': 'aAcc'},
        draw_label_map,
    ),
}


def check_task(file: Path, name: str) -> None:
    """Exits with a message unless a config is for the data and metrics of a task."""
    cfg, own = load_config(str(file)), Config.fromfile(ROOT / TASKS[name].config)
    for key in ('default_scope', 'test_dataloader.dataset.data_root', 'test_evaluator.metric'):
        found, needed = setting(cfg, key), setting(own, key)
        fits = found == needed
        if key.endswith('metric') and found is not None:  # others may be there, too
            fits = {*np.atleast_1d(needed)} <= {*np.atleast_1d(found)}
        if not fits:
            sys.exit(f'error: --task {name} needs {key} {needed!r}, config {file} has {found!r}')


def draw_grid(task: Task, config: Path, images: Path, folder: Path, out: Path) -> None:
    """Write one picture of the first images with what is predicted in them."""
    entries = json.loads((folder / 'predictions.json').read_text())[: COLUMNS * ROWS]
    meta = Config.fromfile(config).test_dataloader.dataset.metainfo
    cells = []
    for entry in entries:
        image = enlarge(cv2.imread(str(images / entry['image']))[..., ::-1], cv2.INTER_CUBIC)
        cell = task.draw(image, entry, meta, folder)
        cells.append(np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % COLUMNS)
    grid = np.vstack([np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)])
    write_whole(out, encode_picture(grid, out.suffix))


def summary(task: Task, metrics: dict[str, float]) -> str:
    """The metrics in a line; mmdet gives none where no image has a detection."""
    if not set(task.metrics.values()) <= set(metrics):
        return 'val: no metrics, as the model detects nothing in any image'
    return 'val ' + ', '.join(f'{name} {metrics[key]:.3f}' for name, key in task.metrics.items())


@program
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--task', choices=TASKS, default='detection', help='what to predict (%(default)s)'
    )
    parser.add_argument('--config', help="config to train (the task's own in configs/demo)")
    parser.add_argument(
        '--work-dir', help='folder for checkpoint, logs and pictures (work_dirs/demo/CONFIG_NAME)'
    )
    parser.add_argument(
        '--pretrained',
        action='store_true',
        help='start the detector from the classifier that --task classification has trained',
    )
    args = parser.parse_args(argv)
    if args.pretrained and (args.task != 'detection' or args.config):
        parser.error('--pretrained goes with the detection task and its own config')
    task = TASKS[args.task]
    own = ROOT / (PRETRAINED if args.pretrained else task.config)
    config = args.config or os.path.relpath(own)
    check_task(Path(config), args.task)
    work_dir = Path('work_dirs/demo', Path(config).stem)
    if args.work_dir:
        work_dir = Path(args.work_dir)
    elif work_dir.is_dir():  # an earlier demo's
        print(f'{work_dir} of an earlier demo is replaced')
        with claim(work_dir):
            shutil.rmtree(work_dir)
    images = DATA / task.images
    if not images.exists():
        run('data', 'dataset_converters/scene_digits.py', str(DATA))
    run('train', 'train.py', config, '--work-dir', str(work_dir))
    last = Path((work_dir / 'last_checkpoint').read_text().strip()).name
    checkpoint = str(work_dir / last)
    evaluation = work_dir / 'evaluation'
    run('evaluate', 'test.py', config, checkpoint, '--work-dir', str(evaluation))
    if args.task == 'classification':
        gather(images, work_dir / 'images')
        images = work_dir / 'images'
    pictures = work_dir / 'predictions'
    options = ('--cfg-options', *task.options) if task.options else ()
    run(
        'predict', 'predict.py', str(images), config, checkpoint, '--out-dir', str(pictures),
        '--limit', str(COLUMNS * ROWS), '--score-thr', str(SCORE_THR), *options,
    )  # fmt: skip
    grid = work_dir / 'predictions.png'
    draw_grid(task, Path(config), images, pictures, grid)

    log_dir = max(p for p in evaluation.iterdir() if (p / f'{p.name}.json').exists())
    metrics = json.loads((log_dir / f'{log_dir.name}.json').read_text())
    print(f'\n{summary(task, metrics)}')
    print(f'checkpoint: {checkpoint}')
    print(f'logs:       {work_dir}')
    print(f'pictures:   {grid} (all in {pictures / "vis"})')
    start = Path(Config.fromfile(ROOT / PRETRAINED).model.backbone.init_cfg.checkpoint)
    if args.task == 'classification' and Path(config).samefile(own):
        start.parent.mkdir(exist_ok=True)
        write_whole(start, Path(checkpoint).read_bytes())
        print(f'weights:    {start}, for the detection demo with --pretrained')


if __name__ == '__main__':
    main()
