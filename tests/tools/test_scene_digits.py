import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import scene_digits as program
from mmdet.datasets import CocoDataset
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from acmix_mm.files import claim


def read(folder, split):
    return json.loads((folder / f'coco/annotations/instances_{split}2017.json').read_text())


@pytest.mark.parametrize(('split', 'count'), [('train', 12), ('val', 4)])
def test_coco_instances(scene_digits, split, count):
    coco = COCO(scene_digits / f'coco/annotations/instances_{split}2017.json')
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list('0123456789')
    assert len(coco.imgs) == count
    for image in coco.imgs.values():
        picture = cv2.imread(str(scene_digits / f'coco/{split}2017' / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3) == (96, 96, 3)
        visible = np.zeros(picture.shape[:2], int)
        for row in coco.loadAnns(coco.getAnnIds(image['id'])):
            mask = coco.annToMask(row).astype(bool)
            ys, xs = np.nonzero(mask)
            x, y, width, height = row['bbox']
            assert (xs.min(), ys.min()) == (x, y)
            assert (xs.max() + 1, ys.max() + 1) == (x + width, y + height)
            assert row['area'] == mask.sum() > 0
            visible += mask
        assert visible.max() == 1  # what is covered belongs to the digit on top only


@pytest.mark.parametrize(('split', 'name'), [('train', 'training'), ('val', 'validation')])
def test_label_maps_agree_with_instances(scene_digits, split, name):
    content = read(scene_digits, split)
    for image in content['images']:
        stem = image['file_name'].removesuffix('.jpg')
        maps = scene_digits / f'ade/annotations/{name}/{stem}.png'
        label_map = cv2.imread(str(maps), cv2.IMREAD_UNCHANGED)
        expected = np.zeros((image['height'], image['width']), np.uint8)
        for row in content['annotations']:
            if row['image_id'] == image['id']:
                expected[coco_mask.decode(row['segmentation']).astype(bool)] = row['category_id']
        np.testing.assert_array_equal(label_map, expected)
        ade, coco = (
            (scene_digits / folder / image['file_name']).read_bytes()
            for folder in (f'ade/images/{name}', f'coco/{split}2017')
        )
        assert ade == coco


@pytest.mark.parametrize(('split', 'count'), [('train', 20), ('val', 10)])
def test_single_digits(scene_digits, split, count):
    """As many of each class, at their own size."""
    folder = scene_digits / 'imagenet' / split
    assert sorted(p.name for p in folder.iterdir()) == list('0123456789')
    for digit in folder.iterdir():
        files = list(digit.iterdir())
        assert len(files) == count / 10
        for file in files:
            assert cv2.imread(str(file)).shape == (48, 48, 3)


def test_single_digit_is_of_its_class(tmp_path, monkeypatch):
    """On black photographs, the digit that is left looks most like the glyphs of its class."""
    black = np.zeros((80, 80, 3), np.uint8)
    monkeypatch.setattr(program, 'photographs', lambda split, size: [black])
    program.write_single_digits(tmp_path, 'val', 50, 64, (40, 40), 0)
    glyphs, labels = program.digits('val', np.random.default_rng(0))
    drawn = np.stack([program.stamp(glyph, 40) for glyph in glyphs])
    right = 0
    for file in (tmp_path / 'imagenet/val').glob('*/*.jpg'):
        picture = cv2.imread(str(file)).max(2) > 80
        ys, xs = np.nonzero(picture)
        patch = picture[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        best = max(range(len(drawn)), key=lambda i: overlap(patch, drawn[i] > 0.5))
        right += labels[best] == int(file.parent.name)
    assert right >= 49


def overlap(patch, glyph):
    """Intersection over union of two masks, each cut to its pixels."""
    ys, xs = np.nonzero(glyph)
    glyph = glyph[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    shape = np.maximum(patch.shape, glyph.shape)
    a, b = (np.pad(m, [(0, s - n) for s, n in zip(shape, m.shape, strict=True)])
            for m in (patch, glyph))  # fmt: skip
    return (a & b).sum() / (a | b).sum()


def test_mmdet_loads_it(scene_digits):
    dataset = CocoDataset(
        data_root=str(scene_digits / 'coco'),
        ann_file='annotations/instances_train2017.json',
        data_prefix={'img': 'train2017/'},
        metainfo={'classes': tuple('0123456789')},
        filter_cfg={'filter_empty_gt': True},
    )
    digits = [instance['bbox_label'] for i in range(len(dataset))
              for instance in dataset.get_data_info(i)['instances']]  # fmt: skip
    categories = [row['category_id'] - 1 for row in read(scene_digits, 'train')['annotations']]
    assert digits == categories


def test_splits_share_nothing():
    assert not program.PHOTOGRAPHS['train'].keys() & program.PHOTOGRAPHS['val'].keys()
    train, val = (program.digits(s, np.random.default_rng(5))[0] for s in ('train', 'val'))
    assert len(train) + len(val) == 1797
    # Some of scikit-learn's digits are equal to the last pixel; those alone may stand in both.
    common = {d.tobytes() for d in train} & {d.tobytes() for d in val}
    images = [d.tobytes() for d in np.concatenate([train, val])]
    assert all(images.count(d) > 1 for d in common)
    assert len(val) == round(0.2 * 1797)


def test_same_seed_repeats_and_force(scene_digits, tmp_path):
    arguments = [
        str(tmp_path), '--train', '3', '--val', '1', '--single-train', '10', '--single-val', '10'
    ]  # fmt: skip
    program.main(arguments)
    first = (tmp_path / 'coco/annotations/instances_train2017.json').read_bytes()
    assert (tmp_path / 'coco/train2017/000000000002.jpg').read_bytes() == (
        scene_digits / 'coco/train2017/000000000002.jpg'
    ).read_bytes()
    with pytest.raises(SystemExit, match=r'exist; give --force to replace'):
        program.main(arguments)
    program.main([*arguments, '--force', '--seed', '1'])
    assert (tmp_path / 'coco/annotations/instances_train2017.json').read_bytes() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ade', 'coco', 'imagenet']


SMALL = ['--train', '3', '--val', '1', '--single-train', '10', '--single-val', '10']


def test_of_one_process_and_whole_or_absent(tmp_path, monkeypatch):
    """A second process is refused; an error leaves what was there, and nothing else."""
    for name in program.LAYOUTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / 'earlier').touch()
    part = tmp_path / '.part-scene_digits'
    part.mkdir()
    with (
        claim(part),
        pytest.raises(SystemExit, match=f'is in use by process {os.getpid()}'),
    ):
        program.main([str(tmp_path), '--force', *SMALL])
    write = program.write_single_digits

    def fail(root, split, *arguments):
        if split == 'val':
            raise OSError(errno.EIO, 'Input/output error')
        write(root, split, *arguments)

    monkeypatch.setattr(program, 'write_single_digits', fail)
    with pytest.raises(SystemExit, match=f'error: {tmp_path}: Input/output error'):
        program.main([str(tmp_path), '--force', *SMALL])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ade', 'coco', 'imagenet']
    assert all((tmp_path / name / 'earlier').exists() for name in program.LAYOUTS)


@pytest.mark.slow
def test_killed(tmp_path, pytestconfig):
    """Nothing has its name before all of it is there; the next process tidies up."""
    script = pytestconfig.rootpath / 'tools' / 'dataset_converters' / 'scene_digits.py'
    arguments = [str(tmp_path), *SMALL, '--train', '2000']
    process = subprocess.Popen([sys.executable, script, *arguments], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob('*/*/coco/train2017/*3.jpg')):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ['.part-scene_digits']
    program.main([str(tmp_path), *SMALL])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ade', 'coco', 'imagenet']
    assert len(list((tmp_path / 'coco' / 'train2017').iterdir())) == 3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--train', '0'], '--train must be at least 1, got 0'),
        (['--digits', '5', '2'], '--digits must satisfy 0 <= MIN <= MAX, got 5 2'),
        (['--digit-size', '20', '70'], r'must satisfy 8 <= MIN <= MAX <= image side \(48\)'),
        (['--single-val', '9'], '--single-val must be at least 10, got 9'),
        (['--seed', '-1'], '--seed must be at least 0, got -1'),
    ],
)
def test_wrong_arguments(capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit):
        program.main([str(tmp_path / 'out'), *arguments])
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / 'out').exists()
