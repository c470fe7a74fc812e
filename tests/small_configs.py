"""Recipes on few pixels of the very small data set."""

import copy
from pathlib import Path

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn


def shrink(steps: list) -> list:
    """A pipeline for pictures of 64x64 pixels at most, otherwise the same."""
    small = {'scale': (64, 64), 'scales': [(48, 64), (64, 64)], 'crop_size': (64, 64)}
    for step in steps:
        for key in step:
            if key == 'transforms':
                step.transforms = [shrink(branch) for branch in step.transforms]
            elif key in small:
                step[key] = small[key]
    return steps


def shrink_config(cfg: Config, scene_digits: Path) -> Config:
    """A config on the very small data set, with fewer pixels and proposals, in place."""
    segmentor = cfg.default_scope == 'mmseg'
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.data_root = str(scene_digits / ('ade' if segmentor else 'coco'))
        shrink(loader.dataset.pipeline)
        if not segmentor:
            loader.dataset.metainfo = {'classes': tuple('0123456789')}
    if segmentor:
        cfg.model.data_preprocessor.size = (64, 64)
    elif 'rpn_head' in cfg.model:
        cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 8
        # Untrained, it is sure of nothing.
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=4)
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 8
    else:
        cfg.model.test_cfg.score_thr = 0.0
    return cfg


_batches: dict[str, dict] = {}


def take(loader: Config, count: int) -> dict:
    """A batch of a loader's data set, the same each time."""
    key = f'{count} {loader.dataset}'
    if key not in _batches:
        dataset = DATASETS.build(loader.dataset)
        _batches[key] = pseudo_collate([dataset[i] for i in range(count)])
    return copy.deepcopy(_batches[key])


def build(cfg: Config) -> nn.Module:
    """The config's model."""
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)
