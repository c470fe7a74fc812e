"""The demo's pictures; the programs that it runs have tests of their own."""

import json

import cv2
import demo
import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from pycocotools import mask as coco_mask


@pytest.mark.parametrize('name', [name for name in demo.TASKS if name != 'classification'])
def test_grid(name, pytestconfig, scene_digits, tmp_path):
    """Two pictures side by side: what is predicted is drawn where it is, on the first only."""
    task = demo.TASKS[name]
    config = pytestconfig.rootpath / task.config
    square = np.zeros((96, 96), np.uint8)
    square[30:60, 20:70] = 1
    if name == 'semantic':
        cv2.imwrite(str(tmp_path / 'first.png'), square * 4)
        cv2.imwrite(str(tmp_path / 'second.png'), square * 0)
        first, second = ({'label_map': f'{stem}.png'} for stem in ('first', 'second'))
    else:
        row = {'label': 3, 'category': '3', 'score': 0.9, 'bbox': [20, 30, 70, 60]}
        if name == 'instance':
            row['mask'] = coco_mask.encode(np.asfortranarray(square))
            row['mask']['counts'] = row['mask']['counts'].decode()
        first, second = {'predictions': [row]}, {'predictions': []}
    image = f'{1:012d}.jpg'
    entries = [{'image': image, **entry} for entry in (first, second)]
    (tmp_path / 'predictions.json').write_text(json.dumps(entries))
    out = tmp_path / 'grid.png'
    demo.draw_grid(task, config, scene_digits / task.images, tmp_path, out)

    cells = np.split(cv2.imread(str(out)).astype(int), demo.COLUMNS, axis=1)
    assert all(cell.shape == (196, 196, 3) for cell in cells)
    assert (cells[2] == 255).all()
    changed = np.abs(cells[0] - cells[1]).max(2)[2:-2, 2:-2] > 0
    middle = changed[80:110, 80:120].copy()
    changed[40:140, 20:160] = False  # the square, enlarged, and room for lines and text
    assert not changed.any()
    # A box is drawn around; masks and label maps also fill.
    assert middle.mean() > 0.9 if name != 'detection' else middle.mean() == 0


def test_classification_grid(pytestconfig, scene_digits, tmp_path):
    """One image of each class and more; a wrong class is written in red, a right one in black."""
    task = demo.TASKS['classification']
    images = tmp_path / 'images'
    demo.gather(scene_digits / task.images, images)
    names = sorted(path.name for path in images.iterdir())
    assert [name.partition('_')[0] for name in names] == list('0123456789')  # one of each is there
    entries = [
        {'image': name, 'predictions': [{'category': category, 'score': 0.5}]}
        for name, category in zip(names[:2], '07', strict=True)
    ]
    (tmp_path / 'predictions.json').write_text(json.dumps(entries))
    out = tmp_path / 'grid.png'
    demo.draw_grid(task, pytestconfig.rootpath / task.config, images, tmp_path, out)
    cells = np.split(cv2.imread(str(out)), demo.COLUMNS, axis=1)
    strips = [cell[2 + 48 * demo.ENLARGE : -2, 2:-2] for cell in cells[:2]]
    for strip, reddest in zip(strips, (0, 220), strict=True):
        written = strip[(strip < 128).any(2)]  # BGR
        assert len(written) > 20
        assert written[:, :2].max() < 128
        assert abs(int(written[:, 2].max()) - reddest) < 128


@pytest.mark.parametrize('name', ['detection', 'instance'])
def test_nothing_detected(name, scene_digits):
    """mmdet's evaluation of no boxes gives no metrics: a line says so."""
    annotations = scene_digits / 'coco/annotations/instances_val2017.json'
    metric = CocoMetric(str(annotations), metric=['bbox', 'segm'], format_only=False)
    metric.dataset_meta = {'classes': [str(digit) for digit in range(10)]}
    none = {'bboxes': torch.zeros(0, 4), 'scores': torch.zeros(0), 'labels': torch.zeros(0).long()}
    image = json.loads(annotations.read_text())['images'][0]
    metric.process({}, [{'pred_instances': {**none, 'masks': torch.zeros(0, 96, 96)},
                         'img_id': image['id'], 'ori_shape': (96, 96)}])  # fmt: skip
    metrics = {**metric.evaluate(size=1), 'time': 0.1}
    assert demo.summary(demo.TASKS[name], metrics) == (
        'val: no metrics, as the model detects nothing in any image'
    )


def test_summary():
    metrics = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_50': 0.75, 'time': 0.1}
    assert demo.summary(demo.TASKS['detection'], metrics) == 'val box mAP 0.500, box AP50 0.750'
