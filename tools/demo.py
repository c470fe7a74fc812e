"""Show the whole way on a small real data set, on a CPU, in some minutes.

Makes scene digits, trains a detector on it, evaluates it, and draws a grid of its predictions on
validation images, whose digits and photographs it has not seen.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

ROOT = Path(__file__).resolve().parents[1]
DATA = Path('data/scene_digits')
CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
METRIC = 'coco/bbox_mAP_50'
COLUMNS, ROWS = 6, 4
SCORE_THR = 0.6
ENLARGE = 2  # the images are small; drawn labels need room


def run(title: str, *command: str) -> None:
    """Run a program of this repository, its output on the terminal."""
    print(f'\n== {title}: python {" ".join(command)}', flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(f'error: {command[0]} failed with exit code {code}')


def draw_grid(images: Path, predictions: Path, out: Path) -> None:
    """Write one picture of the first images with their predicted boxes, classes and scores."""
    entries = json.loads(predictions.read_text())[: COLUMNS * ROWS]
    classes = [str(digit) for digit in range(10)]
    visualizer = DetLocalVisualizer(line_width=2)
    visualizer.dataset_meta = {'classes': classes, 'palette': 'random'}
    cells = []
    for entry in entries:
        image = cv2.imread(str(images / entry['image']))[..., ::-1]
        image = cv2.resize(image, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_CUBIC)
        rows = entry['predictions']
        sample = DetDataSample(
            pred_instances=InstanceData(
                bboxes=np.array([r['bbox'] for r in rows]).reshape(-1, 4) * ENLARGE,
                labels=np.array([r['label'] for r in rows], int),
                scores=np.array([r['score'] for r in rows]),
            )
        )
        visualizer.add_datasample('', image, sample, draw_gt=False, pred_score_thr=0)
        cells.append(np.pad(visualizer.get_image(), ((2, 2), (2, 2), (0, 0)), constant_values=255))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % COLUMNS)
    grid = np.vstack([np.hstack(cells[i : i + COLUMNS]) for i in range(0, len(cells), COLUMNS)])
    cv2.imwrite(str(out), grid[..., ::-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=CONFIG, help='config to train (%(default)s)')
    parser.add_argument(
        '--work-dir', help='folder for checkpoint, logs and pictures (work_dirs/demo/CONFIG_NAME)'
    )
    args = parser.parse_args(argv)
    work_dir = Path(args.work_dir or f'work_dirs/demo/{Path(args.config).stem}')
    if not (ROOT / DATA / 'coco').exists():
        run('data', 'tools/dataset_converters/scene_digits.py', str(DATA))
    run('train', 'tools/train.py', args.config, '--work-dir', str(work_dir))
    checkpoint = (ROOT / work_dir / 'last_checkpoint').read_text().strip()
    evaluation = work_dir / 'evaluation'
    run('evaluate', 'tools/test.py', args.config, checkpoint, '--work-dir', str(evaluation))
    images, pictures = DATA / 'coco' / 'val2017', work_dir / 'predictions'
    run(
        'predict', 'tools/predict.py', str(images), args.config, checkpoint,
        '--out-dir', str(pictures), '--limit', str(COLUMNS * ROWS), '--score-thr', str(SCORE_THR),
        # To look at, one class a box; the metric above ranks all of them.
        '--cfg-options', 'model.test_cfg.nms.class_agnostic=True',
    )  # fmt: skip
    grid = work_dir / 'predictions.png'
    draw_grid(ROOT / images, ROOT / pictures / 'predictions.json', ROOT / grid)

    log_dir = max(p for p in (ROOT / evaluation).iterdir() if (p / f'{p.name}.json').exists())
    metrics = json.loads((log_dir / f'{log_dir.name}.json').read_text())
    print(f'\nval box mAP {metrics["coco/bbox_mAP"]:.3f}, AP50 {metrics[METRIC]:.3f}')
    print(f'checkpoint: {os.path.relpath(checkpoint, ROOT)}')
    print(f'logs:       {work_dir}')
    print(f'pictures:   {grid} (all in {pictures / "vis"})')


if __name__ == '__main__':
    main()
