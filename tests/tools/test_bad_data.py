"""Programs on bad data end in one line that names the file, before anything is written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import check_dataset
import numpy as np
import pytest
import test as evaluate  # tools/test.py
import torch
import train
from bad_data import (
    BAD_ANNOTATIONS,
    BAD_PICTURES,
    MAKE,
    edit,
    make_ade,
    make_coco,
    picture,
    rle,
)
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from programs import program, scalars

# A narrow detector that loads masks, too, tested on its training data; a narrow segmentor and
# classifier.
RECIPES = {
    'coco': """
_base_ = '{root}/configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[32, 64, 128, 256]),
    bbox_head=dict(num_classes=3),
)
def data(split):
    return dict(
        dataset=dict(
            data_root='{data}/',
            ann_file='annotations/instances_' + split + '2017.json',
            data_prefix=dict(img=split + '2017/'),
            metainfo=dict(classes=('cat', 'dog', 'owl')),
        ),
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
    )
train_dataloader = data('train')
val_dataloader = data('val')
test_dataloader = data('train')
train_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs'),
]
val_dataloader['dataset']['pipeline'] = test_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
val_evaluator = dict(ann_file='{data}/annotations/instances_val2017.json')
test_evaluator = dict(ann_file='{data}/annotations/instances_train2017.json')
""",
    'ade': """
_base_ = '{root}/configs/demo/acmix-pvt_fpn_scene-digits.py'
model = dict(decode_head=dict(num_classes=3))
def data(split):
    return dict(
        dataset=dict(
            data_root='{data}',
            data_prefix=dict(img_path='images/' + split, seg_map_path='annotations/' + split),
            metainfo=dict(classes=('cat', 'dog', 'owl'), palette=[[0] * 3, [1] * 3, [2] * 3]),
        ),
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
    )
train_dataloader = data('training')
val_dataloader = data('validation')
test_dataloader = data('training')
""",
    'imagenet': """
_base_ = '{root}/configs/demo/acmix-r26_scene-digits.py'
model = dict(head=dict(num_classes=3))
def data(split):
    return dict(
        dataset=dict(
            data_root='{data}/',
            data_prefix=split,
            metainfo=dict(classes=('cat', 'dog', 'owl')),
        ),
        batch_size=1,
        num_workers=0,
        persistent_workers=False,
    )
train_dataloader = data('train')
val_dataloader = data('val')
test_dataloader = data('train')
""",
}


def write_recipe(folder: Path, data: Path, layout: str, more: str = '') -> str:
    file = folder / 'recipe.py'
    file.write_text(RECIPES[layout].format(root=Path().resolve(), data=data) + more)
    return str(file)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """For each layout, a checkpoint that fits its recipe."""
    folder = tmp_path_factory.mktemp('checkpoints')
    made = {}

    def checkpoint(layout: str) -> str:
        if layout not in made:
            cfg = Config.fromfile(write_recipe(folder, folder, layout))
            init_default_scope(cfg.default_scope)
            made[layout] = str(folder / f'{layout}.pth')
            torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, made[layout])
        return made[layout]

    return checkpoint


def ends(main, arguments: list[str], expected: list[str], capsys) -> None:
    """Assert that a program ends in one line with what is expected."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    message = ended.value.code
    assert isinstance(message, str)
    assert message.startswith('error: ')
    assert len(message.splitlines()) == 1
    assert all(part in message for part in expected), message
    assert 'Traceback' not in ''.join(capsys.readouterr())


def run_all(
    layout: str, name: str, case: tuple, folder: Path, checkpoints, campaign, counted: str, capsys
) -> None:
    """Each program on a data set that is spoilt."""
    if layout == 'imagenet':
        pytest.importorskip('mmpretrain')
    data = folder / 'data'
    MAKE[layout](data)
    spoil, expected = case
    spoil(data)
    recipe = write_recipe(folder, data, layout)
    work = folder / 'work'
    campaign(counted, f'check_dataset.py: {name}')
    ends(check_dataset.main, [recipe], expected, capsys)
    campaign(counted, f'train.py: {name}')
    ends(train.main, [recipe, '--work-dir', str(work)], expected, capsys)
    if not any('val' in part or 'filter_cfg' in part for part in expected):
        campaign(counted, f'test.py: {name}')
        arguments = [recipe, checkpoints(layout), '--work-dir', str(work)]
        ends(evaluate.main, arguments, expected, capsys)
    assert not work.exists()


@pytest.mark.slow
@pytest.mark.parametrize('name', BAD_ANNOTATIONS)
def test_bad_annotations(name, tmp_path, checkpoints, campaign, capsys):
    case = BAD_ANNOTATIONS[name]
    run_all('coco', name, case, tmp_path, checkpoints, campaign, 'bad annotations', capsys)


@pytest.mark.slow
@pytest.mark.parametrize('name', BAD_PICTURES)
def test_bad_pictures(name, tmp_path, checkpoints, campaign, capsys):
    layout, *case = BAD_PICTURES[name]
    counted = 'bad pictures and label maps'
    run_all(layout, name, case, tmp_path, checkpoints, campaign, counted, capsys)


def test_one_of_each(tmp_path, checkpoints, campaign, capsys):
    """The rest of the campaigns is slow."""
    case = BAD_ANNOTATIONS['bbox with NaN']
    run_all(
        'coco', 'bbox with NaN', case, tmp_path, checkpoints, campaign, 'bad annotations', capsys
    )


MASKS = """
_base_ = '{base}'
model = dict(roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)))
"""
ONE_EPOCH = [
    '--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
    'train_dataloader.dataset.filter_cfg.min_size=0',
    'train_dataloader.batch_size=3',  # batch norm cannot do with one pixel of one image
]  # fmt: skip


def crowds_only(root: Path) -> None:
    """Masks as run lengths, as COCO has them of crowds."""
    mask = rle([960, 960])
    for split in ('train', 'val'):
        edit(
            lambda content: [
                a.update(iscrowd=1, segmentation=mask) for a in content['annotations']
            ],
            split,
        )(root)


def no_objects(root: Path) -> None:
    for split in ('train', 'val'):
        edit(lambda content: content['annotations'].clear(), split)(root)


def one_pixel(width: int, height: int) -> Callable[[Path], None]:
    """Pictures without objects of such a size, next to one with objects."""

    def act(root: Path) -> None:
        def shrink(content: dict) -> None:
            for image in content['images'][1:]:
                image.update(width=width, height=height)
            content['annotations'] = content['annotations'][:3]

        for split in ('train', 'val'):
            edit(shrink, split)(root)
            for i in (1, 2):
                picture(root / f'{split}2017/{i}.png', (width, height))

    return act


def one_pixel_with_objects(root: Path) -> None:
    def shrink(content: dict) -> None:
        for image in content['images']:
            image.update(width=1, height=1)
        for a in content['annotations']:
            a.update(bbox=[0, 0, 1, 1], area=1, segmentation=rle([0, 1], (1, 1)))

    for split in ('train', 'val'):
        edit(shrink, split)(root)
        for i in range(3):
            picture(root / f'{split}2017/{i}.png', (1, 1))


@pytest.mark.slow
@pytest.mark.parametrize('detector', ['RetinaNet', 'Mask R-CNN'])
@pytest.mark.parametrize(
    'change, keep_empty',
    [
        (crowds_only, False),
        (no_objects, True),
        (one_pixel(1, 40), True),
        (one_pixel(48, 1), True),
        (one_pixel(1, 1), True),
        (one_pixel_with_objects, False),
    ],
)
def test_unusual_data_train(detector, change, keep_empty, tmp_path):
    """Losses are finite, and the evaluation ends."""
    make_coco(tmp_path / 'data')
    change(tmp_path / 'data')
    recipe = write_recipe(tmp_path, tmp_path / 'data', 'coco')
    if detector == 'Mask R-CNN':
        text = Path(recipe).read_text()
        base = Path('configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py').resolve()
        Path(recipe).write_text(MASKS.format(base=base) + text[text.index('def data') :])
    keep = f'train_dataloader.dataset.filter_cfg.filter_empty_gt={not keep_empty}'
    program('train', recipe, '--work-dir', str(tmp_path / 'work'), *ONE_EPOCH, keep)
    losses = [row['loss'] for row in scalars(tmp_path / 'work') if 'loss' in row]
    assert len(losses) == 1
    assert np.isfinite(losses).all()


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('what', ['picture', 'label map'])
def test_damage_that_is_found_while_training_is_named(what, workers, tmp_path):
    """The 18th of 53 by name, where the quick check does not look."""
    data = tmp_path / 'data'
    make_ade(data)
    for i in range(10, 60):
        picture(data / f'images/training/{i}.jpg')
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(data / f'annotations/training/{i}.png')
    damaged = 'images/training/24.jpg' if what == 'picture' else 'annotations/training/24.png'
    (data / damaged).write_bytes(b'')
    recipe = write_recipe(tmp_path, data, 'ade')
    options = [f'train_dataloader.num_workers={workers}', 'train_dataloader.sampler.shuffle=False']
    command = [sys.executable, 'tools/train.py', recipe, '--work-dir', str(tmp_path / 'work')]
    result = subprocess.run(
        [*command, '--cfg-options', *options], capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith('error: ')
    assert str(data / damaged) in last
