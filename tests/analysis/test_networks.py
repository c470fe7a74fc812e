from pathlib import Path

import pytest

from acmix_mm.analysis.networks import build_backbone, image_size
from acmix_mm.analysis.steps import Case
from acmix_mm.command_line import load_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
FILES = ('_base_/backbones/r50.py', 'acmix_resnet/retinanet_acmix-r26_fpn_8xb2-1x_coco.py')


@pytest.mark.parametrize('file', FILES)
def test_all_of_a_backbone_trains(file):
    """Also what its config freezes, so that comparisons are fair."""
    step = build_backbone(str(CONFIGS / file), None, 'plain', Case((2, 3, 64, 64), train=True))
    step()
    assert all(parameter.grad is not None for parameter in step.leaves)
    step.reset()
    assert all(parameter.grad is None for parameter in step.leaves)


@pytest.mark.parametrize(
    ('config', 'options', 'size'),
    [
        ('acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py', None, (800, 1333)),
        ('acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py', None, (512, 2048)),
        (
            'demo/retinanet_acmix-r26_fpn_scene-digits.py',
            {'test_dataloader.dataset.pipeline': [{'type': 'CenterCrop', 'crop_size': 224}]},
            (224, 224),
        ),
    ],
)
def test_size_of_the_test_pipeline(config, options, size):
    assert image_size(load_config(str(CONFIGS / config), options)) == size


def test_no_size_in_the_test_pipeline():
    cfg = load_config(str(CONFIGS / 'demo/retinanet_acmix-r26_fpn_scene-digits.py'))
    with pytest.raises(ValueError, match='cfg must have a test pipeline that resizes or crops'):
        image_size(cfg)
