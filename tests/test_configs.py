"""Every config of the repository builds; users' configs can inherit mmdet's and ours."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from acmix_mm.backbones import ACmixResNet

ROOT = Path(__file__).resolve().parents[1] / 'configs'
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob('*.py') if '_base_' not in p.parts)


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope(cfg.default_scope)
    from mmdet.registry import MODELS

    return MODELS.build(cfg.model)


@pytest.mark.parametrize('name', CONFIGS)
def test_builds(name):
    cfg = Config.fromfile(ROOT / name)
    model = build(cfg)
    # Every part of the recipe builds, too: optimiser, schedule, hooks are checked by the Runner.
    optim_wrapper = Runner.build_optim_wrapper(
        type('Builder', (), {'model': model})(), cfg.optim_wrapper
    )
    assert sum(len(g['params']) for g in optim_wrapper.param_groups) > 0
    assert cfg.custom_imports.imports == ['acmix_mm']
    model.eval()
    features = model.extract_feat(torch.zeros(1, 3, 64, 96))
    assert len(features) == len(model.bbox_head.prior_generator.strides)


@pytest.mark.parametrize('depth', [26, 38, 50])
def test_retinanet_recipe(depth):
    """ACmix (CVPR 2022), appendix: RetinaNet 1x on COCO."""
    cfg = Config.fromfile(ROOT / f'acmix_resnet/retinanet_acmix-r{depth}_fpn_8xb2-1x_coco.py')
    assert cfg.model.backbone.type == 'ACmixResNet'
    assert cfg.model.backbone.depth == depth
    assert f'acmix-r{depth}' in cfg.model.backbone.init_cfg.checkpoint
    assert cfg.optim_wrapper.optimizer.type == 'SGD'
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    assert cfg.train_cfg.max_epochs == 12
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.end, warmup.by_epoch) == ('LinearLR', 500, False)
    assert (steps.milestones, steps.gamma) == ([8, 11], 0.1)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        (resize,) = [t for t in loader.dataset.pipeline if t.type == 'Resize']
        assert resize.scale == (1333, 800)
    assert cfg.test_dataloader.dataset.data_root == 'data/coco/'


def test_plain_resnet_differs_in_the_operator_only():
    mixed, plain = (
        Config.fromfile(ROOT / f'demo/retinanet_{name}_fpn_scene-digits.py').to_dict()
        for name in ('acmix-r26', 'r26')
    )
    assert plain['model']['backbone'].pop('stage_with_acmix') == (False,) * 4
    mixed.pop('custom_imports'), plain.pop('custom_imports')
    assert plain == mixed


def test_users_config_on_mmdets_base(tmp_path):
    """A config that inherits mmdet's RetinaNet and takes our backbone."""
    file = tmp_path / 'user.py'
    file.write_text("""
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['acmix_mm'])
model = dict(backbone=dict(_delete_=True, type='ACmixResNet', depth=26, frozen_stages=1))
""")
    cfg = Config.fromfile(file)
    model = build(cfg)
    assert isinstance(model.backbone, ACmixResNet)
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    assert len(model.extract_feat(torch.zeros(1, 3, 64, 64))) == 5


def test_users_config_on_our_base_with_mmdets_resnet(tmp_path):
    """ACmix as mmdet's ResNet's deformable convolution would be, and in the neck."""
    file = tmp_path / 'user.py'
    file.write_text(f"""
_base_ = '{ROOT}/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py'
model = dict(
    backbone=dict(
        _delete_=True, type='ResNet', depth=50,
        dcn=dict(type='ACmix', num_heads=8), stage_with_dcn=(False, False, True, True)),
    neck=dict(conv_cfg=dict(type='ACmix')))
""")
    model = build(Config.fromfile(file))
    assert model.backbone.layer4[2].conv2.num_heads == 8
    assert len(model.extract_feat(torch.zeros(1, 3, 64, 64))) == 5
