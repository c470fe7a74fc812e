"""The whole way from a classifier's training to a detector that starts from its weights."""

import math

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from programs import program, scalars

pytest.importorskip('mmpretrain')

CLASSIFIER = 'configs/demo/acmix-r26_scene-digits.py'
DETECTOR = 'configs/demo/retinanet_acmix-r26-pre_fpn_scene-digits.py'
ONE_EPOCH = ['train_cfg.max_epochs=1', 'default_hooks.logger.interval=1']


@pytest.fixture(scope='module')
def checkpoint(single_digits_options, tmp_path_factory):
    """Of a classifier after one epoch of five iterations."""
    work_dir = tmp_path_factory.mktemp('classifier')
    options = [*single_digits_options, *ONE_EPOCH, 'model.backbone.base_channels=8',
               'model.head.in_channels=256']  # fmt: skip
    program('train', CLASSIFIER, '--work-dir', str(work_dir), '--cfg-options', *options)
    assert len([row for row in scalars(work_dir) if 'loss' in row]) == 5
    assert any('accuracy/top1' in row for row in scalars(work_dir))
    return work_dir / 'epoch_1.pth'


@pytest.fixture(scope='module')
def options(checkpoint):
    return [
        'model.backbone.base_channels=8',
        'model.neck.in_channels=[32,64,128,256]',
        f'model.backbone.init_cfg.checkpoint={checkpoint}',
    ]


def test_every_weight_of_the_backbone_is_used(checkpoint, options):
    cfg = Config.fromfile(DETECTOR)
    cfg.model.backbone.base_channels = 8
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    assert cfg.model.backbone.init_cfg.prefix == 'backbone.'
    cfg.model.backbone.init_cfg.checkpoint = str(checkpoint)
    init_default_scope('mmdet')
    torch.manual_seed(1)  # another one than the classifier's
    model = MODELS.build(cfg.model)
    before = model.backbone.layer1[0].conv2.rate1.clone()
    model.init_weights()
    expected = torch.load(checkpoint, weights_only=False)['state_dict']
    expected = {k: v for k, v in expected.items() if k.startswith('backbone.')}
    loaded = {f'backbone.{name}': v for name, v in model.backbone.state_dict().items()}
    assert loaded.keys() == expected.keys()
    torch.testing.assert_close(loaded, expected, rtol=0, atol=0)
    assert not torch.equal(model.backbone.layer1[0].conv2.rate1, before)


def test_detector_trains_from_it(digits_options, options, tmp_path):
    program(
        'train', DETECTOR, '--work-dir', str(tmp_path), '--cfg-options', *digits_options, *options,
        *ONE_EPOCH,
    )  # fmt: skip
    losses = [row['loss'] for row in scalars(tmp_path) if 'loss' in row]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'epoch_1.pth' in log


@pytest.mark.slow
def test_without_the_classifier(digits_options, tmp_path):
    with pytest.raises(
        AssertionError, match=r'none\.pth does not exist, and model\.backbone starts'
    ):
        program(
            'train', DETECTOR, '--work-dir', str(tmp_path / 'work'), '--cfg-options',
            *digits_options, f'model.backbone.init_cfg.checkpoint={tmp_path}/none.pth',
        )  # fmt: skip
    assert not (tmp_path / 'work').exists()
