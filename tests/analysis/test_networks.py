from pathlib import Path

import pytest

from acmix_mm.analysis.networks import build_backbone
from acmix_mm.analysis.steps import Case

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
