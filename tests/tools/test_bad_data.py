"""Programs on bad data end in one line that names the file, before anything is written."""

from pathlib import Path

import check_dataset
import pytest
import test as evaluate  # tools/test.py
import torch
import train
from bad_data import (
    BAD_ANNOTATIONS,
    BAD_PICTURES,
    MAKE,
)
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

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
