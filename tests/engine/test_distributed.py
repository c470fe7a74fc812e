"""Detectors and segmentors in two processes: mmdet normalises the losses of each by itself."""

import copy
from pathlib import Path

import pytest
import torch
from mmdet.models.utils import unpack_gt_instances
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from parallel_step import mean_gradients
from processes import parallel_step
from small_configs import build, shrink_config, take
from torch import nn

DEMO = Path(__file__).parents[2] / 'configs' / 'demo'
NARROW = {
    'retinanet_acmix-r26_fpn': {
        'model.backbone.base_channels': 8, 'model.neck.in_channels': [32, 64, 128, 256],
    },
    'retinanet_acmix-san10_fpn': {},
    'acmix-pvt_fpn': {},
}  # fmt: skip


def model_and_halves(name: str, scene_digits: Path) -> tuple[nn.Module, list[dict]]:
    """A demo's model in float64, and a batch of four cut in half."""
    cfg = shrink_config(Config.fromfile(DEMO / f'{name}_scene-digits.py'), scene_digits)
    cfg.merge_from_dict(NARROW[name])
    model = build(cfg)
    batch = model.data_preprocessor(take(cfg.train_dataloader, 4), training=True)
    images, samples = batch['inputs'].double(), batch['data_samples']
    halves = [{'inputs': images[i : i + 2], 'data_samples': samples[i : i + 2]} for i in (0, 2)]
    return model.double(), halves


def step_of_whole_batch(model: nn.Module, halves: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients of a one-stage detector whose norms see both halves, and its losses one each."""
    model.train()
    maps = model.bbox_head(model.extract_feat(torch.cat([half['inputs'] for half in halves])))
    loss = 0
    for i, half in enumerate(halves):
        own = [[level.chunk(2)[i] for level in levels] for levels in maps]
        instances, ignored, metas = unpack_gt_instances(half['data_samples'])
        losses = model.bbox_head.loss_by_feat(*own, instances, metas, ignored)
        loss = loss + model.parse_losses(losses)[0] / 2
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.slow
def test_gradients(scene_digits, tmp_path):
    """The mean of what one process gets for each half.

    With synchronised norms the statistics, and what they pass back, are those of the whole batch.
    """
    cases = [model_and_halves(name, scene_digits) for name in NARROW]
    model, halves = cases[1]
    tasks = [*cases, (convert_sync_batchnorm(copy.deepcopy(model)), halves)]
    *plain, synchronised = parallel_step(tasks, tmp_path)
    for (model, halves), results in zip(cases, plain, strict=True):
        expected = mean_gradients(model, halves)
        for result in results:
            torch.testing.assert_close(result['grads'], expected)
    model, halves = cases[1]
    separate = mean_gradients(model, halves)
    expected = step_of_whole_batch(model, halves)
    for result in synchronised:
        torch.testing.assert_close(result['grads'], expected)
        torch.testing.assert_close(result['buffers'], dict(model.named_buffers()))
    # They do differ from those of norms by process.
    name = 'backbone.layer0.0.conv.weight'
    with pytest.raises(AssertionError):
        torch.testing.assert_close(separate[name], expected[name], rtol=1e-3, atol=0)
