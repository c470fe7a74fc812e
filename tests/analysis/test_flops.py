"""Counted operations against closed forms and the papers' figures."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from acmix_mm.analysis.flops import count_flops
from acmix_mm.analysis.networks import backbone_config, build_model
from acmix_mm.layers import ACmix
from acmix_mm.ops import local_aggregation

BACKBONES = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'backbones'


@pytest.mark.parametrize(
    ('name', 'billions'), [('r50', 4.09), ('acmix-r50', 3.6), ('swin-t', 4.5), ('pvt-s', 3.8)]
)
def test_published_flops(name, billions):
    """At 224 pixels; the figures are with a classifier, which is negligible."""
    model = build_model(backbone_config(str(BACKBONES / f'{name}.py')))
    model.eval()
    image = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        assert count_flops(lambda: model(image)) / 1e9 == pytest.approx(billions, rel=0.04)


def test_flops_of_operators():
    channels, pixels = 32, 12 * 10
    layer, x = ACmix(channels, channels), torch.zeros(1, channels, 12, 10)
    paths = 3 * channels + 2 * 49 + 9 * 12  # projections, logits and sums of 49, folded convolution
    folding = channels * 9 * 9 * 12
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == channels * pixels * paths + folding
    value, weight = torch.zeros(1, 8, 12, 10), torch.zeros(1, 4, 25, 12, 10)
    assert count_flops(lambda: local_aggregation(value, weight, 5)) == 25 * 8 * pixels
    query = torch.zeros(1, 2, 30, 16)
    attend = F.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, query, query)) == 2 * 2 * 30 * 30 * 16
