"""Every config of the repository trains and predicts; users' configs inherit mmdet's and ours."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from acmix_mm.backbones import ACmixResNet

ROOT = Path(__file__).resolve().parents[1] / 'configs'
CONFIGS = sorted(  # of detectors and segmentors; those of classifiers: test_imagenet_configs.py
    str(p.relative_to(ROOT))
    for p in ROOT.rglob('*.py')
    if not {'_base_', 'imagenet'} & set(p.parts)
)
HEADS = ('retinanet', 'mask-rcnn', 'cascade-rcnn', 'cascade-mask-rcnn')
SIZES = {'resnet': ['r50'], 'pvt': ['pvt-t', 'pvt-s'], 'swin': ['swin-t', 'swin-s']}


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def test_grid():
    """Every backbone has a config with every head."""
    expected = {
        f'acmix_{family}/{head}_acmix-{size}_fpn_8xb2-{length}_coco.py'
        for family, sizes in SIZES.items()
        for size in sizes
        for head in HEADS
        for length in (['1x'] if family == 'resnet' else ['1x', '3x'])
    }
    expected |= {
        f'acmix_{family}/acmix-{size}_{head}_ade20k-512x512.py'
        for family, sizes in SIZES.items()
        for size in sizes
        for head in ('fpn_8xb2-80k', 'upernet_8xb2-160k')
    }
    assert len(expected) == 36 + 10
    expected |= {
        f'{folder}/{head}_{name}19_fpn_8xb2-1x_coco.py'
        for folder, name in (('san', 'san'), ('acmix_san', 'acmix-san'))
        for head in HEADS
    }
    expected |= {
        f'acmix_san/acmix-san19_{head}_ade20k-512x512.py'
        for head in ('fpn_8xb2-80k', 'upernet_8xb2-160k')
    }
    expected |= {
        f'dwnet/{head}_{dynamic}dwnet-t_fpn_8xb2-1x_coco.py'
        for head in ('retinanet', 'mask-rcnn')
        for dynamic in ('', 'dynamic-')
    }
    expected |= {
        f'dwnet/{name}.py'
        for size in ('t', 'b')
        for name in (
            f'cascade-mask-rcnn_dwnet-{size}_fpn_8xb2-3x_coco',
            f'dwnet-{size}_upernet_8xb2-160k_ade20k-512x512',
        )
    }
    expected |= {
        f'x_volution/{head}_x-volution-r50_fpn_8xb2-1x_coco.py'
        for head in ('retinanet', 'mask-rcnn')
    }
    assert expected <= set(CONFIGS)


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


def small_config(name: str, scene_digits: Path) -> Config:
    """A config on the very small data set, with fewer pixels and proposals; else as it is."""
    cfg = Config.fromfile(ROOT / name)
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


def take(loader: Config, count: int) -> dict:
    """A batch of a loader's data set."""
    dataset = DATASETS.build(loader.dataset)
    return pseudo_collate([dataset[i] for i in range(count)])


def check_decay(model: torch.nn.Module, cfg: Config) -> None:
    """Norms, position parameters and rates have no weight decay, all others have it."""
    optim_wrapper = Runner.build_optim_wrapper(
        type('Builder', (), {'model': model})(), cfg.optim_wrapper
    )
    decay = {
        id(parameter): group['weight_decay']
        for group in optim_wrapper.param_groups
        for parameter in group['params']
        if parameter.requires_grad
    }
    base = cfg.optim_wrapper.optimizer.weight_decay
    assert base > 0
    free = {'norms': 0, 'relative_position_bias_table': 0, 'pos_embed': 0, 'rate1': 0, 'rate2': 0}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            norm = isinstance(module, (_BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm))
            kind = 'norms' if norm else name
            if cfg.optim_wrapper.optimizer.type == 'AdamW' and kind in free:
                assert decay.pop(id(parameter)) == 0, name
                free[kind] += 1
            else:
                assert decay.pop(id(parameter)) == base, name
    assert not decay
    if cfg.optim_wrapper.optimizer.type == 'AdamW':
        expected = {
            'ACmixSwinTransformer': {'rate1', 'rate2', 'relative_position_bias_table'},
            'ACmixPyramidVisionTransformer': {'rate1', 'rate2', 'pos_embed'},
            'DWNet': set(),
        }[cfg.model.backbone.type]
        if cfg.model.backbone.get('mix') == 'conv':
            expected = set()
        assert {kind for kind, count in free.items() if count} == {'norms', *expected}


def trains_long(name: str) -> bool:
    """3x is 1x for longer, with the same model."""
    return '-3x_' in name and name.replace('-3x_', '-1x_') in CONFIGS


@pytest.mark.parametrize('name', filter(trains_long, CONFIGS))
def test_builds(name, scene_digits):
    cfg = small_config(name, scene_digits)
    check_decay(build(cfg), cfg)


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * trains_long(n)) for n in CONFIGS]
)
def test_trains_and_predicts(name, scene_digits):
    """One loss, with a gradient for all that is trained, and one prediction."""
    cfg = small_config(name, scene_digits)
    assert cfg.custom_imports.imports == ['acmix_mm']
    model = build(cfg)
    if 'scene-digits' not in name:
        check_decay(model, cfg)

    model.train()
    losses = model(**model.data_preprocessor(take(cfg.train_dataloader, 2), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    loss.backward()
    # DistributedDataParallel refuses what has none.
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]

    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(take(cfg.test_dataloader, 1))
    if cfg.default_scope == 'mmseg':
        assert sample.pred_sem_seg.shape == (96, 96)
        assert len(sample.seg_logits.data) == cfg.model.decode_head.num_classes
    else:
        assert len(sample.pred_instances) > 0
        assert ('masks' in sample.pred_instances) == ('mask-rcnn' in name)


def test_ade20k_tta(scene_digits):
    """Six scales of the test size, each also mirrored, merged at the image's own size."""
    name = 'acmix_pvt/acmix-pvt-t_fpn_8xb2-80k_ade20k-512x512.py'
    scales = [step.scale for step in Config.fromfile(ROOT / name).tta_pipeline[1].transforms[0]]
    assert [scale[1] for scale in scales] == [256, 384, 512, 640, 768, 896]
    assert {long / short for long, short in scales} == {4}
    cfg = small_config(name, scene_digits)
    cfg.test_dataloader.dataset.pipeline = shrink(cfg.tta_pipeline)
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    model = build(cfg).eval()
    batch = take(cfg.test_dataloader, 1)
    assert len(batch['inputs']) == 12
    with torch.no_grad():
        (sample,) = model.test_step(batch)
    assert sample.pred_sem_seg.shape == (96, 96)


# By family: optimiser, learning rate, weight decay, warm-up iterations.
COCO = {
    'resnet': ('SGD', 0.01, 1e-4, 500),
    'san': ('SGD', 0.01, 1e-4, 500),
    'x_volution': ('SGD', 0.01, 1e-4, 500),
    'pvt': ('AdamW', 1e-4, 1e-4, 500),
    'swin': ('AdamW', 1e-4, 0.05, 1000),
}
ADE20K = {
    'resnet': ('SGD', 0.01, 5e-4, 0),
    'san': ('SGD', 0.01, 5e-4, 0),
    'pvt': ('AdamW', 1e-4, 1e-4, 0),
    'swin': ('AdamW', 6e-5, 0.01, 1500),
}


def family(name: str) -> str:
    folder = name.split('/')[0].removeprefix('acmix_')
    return 'swin' if folder == 'dwnet' else folder  # whose recipe DWNet's authors take


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.endswith('_coco.py')])
def test_coco_recipe(name):
    """ACmix (CVPR 2022), appendix."""
    cfg = Config.fromfile(ROOT / name)
    warmup, steps = cfg.param_scheduler
    optimizer = cfg.optim_wrapper.optimizer
    recipe = (optimizer.type, optimizer.lr, optimizer.weight_decay, warmup.end)
    assert recipe == COCO[family(name)]
    assert optimizer.get('betas', (0.9, 0.999)) == (0.9, 0.999)
    assert (warmup.type, warmup.by_epoch) == ('LinearLR', False)
    epochs, milestones = (36, [27, 33]) if '-3x_' in name else (12, [8, 11])
    assert cfg.train_cfg.max_epochs == steps.end == epochs
    assert (steps.milestones, steps.gamma) == (milestones, 0.1)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    train, test = (x.dataset for x in (cfg.train_dataloader, cfg.test_dataloader))
    assert train.data_root == test.data_root == 'data/coco/'
    assert [t.scale for t in test.pipeline if t.type == 'Resize'] == [(1333, 800)]
    if '-3x_' in name:
        (choice,) = [t for t in train.pipeline if t.type == 'RandomChoice']
        (whole,), (_, crop, enlarge) = choice.transforms
        assert whole == enlarge
        assert sorted(side for side, _ in whole.scales) == [*range(480, 801, 32)]
        assert crop.crop_size == (384, 600)
    else:
        assert [t.scale for t in train.pipeline if t.type == 'Resize'] == [(1333, 800)]


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'ade20k' in name])
def test_ade20k_recipe(name):
    """ACmix (CVPR 2022), appendix; SGD as in MMSegmentation's ResNet configs."""
    cfg = Config.fromfile(ROOT / name)
    *warmup, poly = cfg.param_scheduler
    optimizer = cfg.optim_wrapper.optimizer
    recipe = (optimizer.type, optimizer.lr, optimizer.weight_decay, poly.begin)
    assert recipe == ADE20K[family(name)]
    assert [(w.type, w.end) for w in warmup] == [('LinearLR', 1500)] * (family(name) == 'swin')
    iterations = 160_000 if 'upernet' in name else 80_000
    power = 1.0 if family(name) == 'swin' else 0.9
    assert (poly.type, poly.power, poly.end) == ('PolyLR', power, iterations)
    assert cfg.train_cfg.max_iters == iterations
    assert cfg.train_dataloader.batch_size * 8 == 16
    assert cfg.model.decode_head.num_classes == 150
    assert cfg.model.data_preprocessor.size == (512, 512)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomCrop'].crop_size == (512, 512)
    assert steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert {'RandomFlip', 'PhotoMetricDistortion'} <= steps.keys()


@pytest.mark.parametrize(
    ('size', 'arguments', 'weights'),
    [
        ('pvt-t', {'num_layers': [2, 2, 2, 2]}, 'pvt_tiny'),
        ('pvt-s', {'num_layers': [3, 4, 6, 3]}, 'pvt_small'),
        ('swin-t', {'depths': [2, 2, 6, 2], 'embed_dims': 96}, 'swin_tiny_patch4_window7_224'),
        ('swin-s', {'depths': [2, 2, 18, 2], 'embed_dims': 96}, 'swin_small_patch4_window7_224'),
    ],
)
def test_sizes_and_initial_weights(size, arguments, weights):
    names = [n for n in CONFIGS if f'acmix-{size}_' in n and not n.startswith('demo/')]
    assert len(names) == 10
    for name in names:
        backbone = Config.fromfile(ROOT / name).model.backbone
        assert {key: backbone[key] for key in arguments} == arguments
        assert backbone.init_cfg.checkpoint == f'checkpoints/{weights}.pth'
        assert backbone.warm_start
        assert backbone.convert_weights


@pytest.mark.parametrize('depth', [26, 38, 50])
def test_resnet_depths(depth):
    cfg = Config.fromfile(ROOT / f'acmix_resnet/retinanet_acmix-r{depth}_fpn_8xb2-1x_coco.py')
    assert cfg.model.backbone.type == 'ACmixResNet'
    assert cfg.model.backbone.depth == depth
    assert f'acmix-r{depth}' in cfg.model.backbone.init_cfg.checkpoint


@pytest.mark.parametrize(('folder', 'name'), [('san', 'san'), ('acmix_san', 'acmix-san')])
@pytest.mark.parametrize('depth', [10, 15, 19])
def test_san_depths(folder, name, depth):
    cfg = Config.fromfile(ROOT / f'{folder}/retinanet_{name}{depth}_fpn_8xb2-1x_coco.py')
    assert cfg.model.backbone.type == ('ACmixSAN' if folder == 'acmix_san' else 'SAN')
    assert cfg.model.backbone.depth == depth
    assert f'{name}{depth}_' in cfg.model.backbone.init_cfg.checkpoint


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.startswith('dwnet/')])
def test_dwnets(name):
    """Kind of network and the file of its weights, as its authors name it."""
    cfg = Config.fromfile(ROOT / name)
    backbone = cfg.model.backbone
    arch = 'base' if 'dwnet-b' in name else 'tiny'
    kind = 'homogeneous' if 'dynamic-' in name else None
    if 'i-dynamic-' in name:
        kind = 'inhomogeneous'
    assert (backbone.arch, backbone.get('dynamic')) == (arch, kind)
    prefix = {'inhomogeneous': 'i_dynamic_', 'homogeneous': 'dynamic_', None: ''}[kind]
    assert backbone.init_cfg.checkpoint == f'checkpoints/{prefix}dwnet_{arch}_224.pth'
    assert backbone.convert_weights
    # Their configs: 0.3 for the base network and in segmentation, 0.2 otherwise, which is DWNet's
    # own for the tiny one.
    expected = 0.3 if arch == 'base' or 'ade20k' in name else None
    assert backbone.get('drop_path_rate') == expected


@pytest.mark.parametrize('name', [name for name in CONFIGS if name.startswith('demo/retinanet')])
def test_demo_retinanets_differ_in_the_backbone_only(name):
    """So that what they reach compares: the same detector, data, schedule and runtime."""
    ours, theirs = (
        Config.fromfile(ROOT / file).to_dict()
        for file in (name, 'demo/retinanet_acmix-r26_fpn_scene-digits.py')
    )
    for cfg in (ours, theirs):
        cfg['model'].pop('backbone'), cfg['model']['neck'].pop('in_channels')
        cfg.pop('custom_imports')
    assert ours == theirs


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
