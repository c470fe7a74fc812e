"""Recipes of image classifiers: what they build, how they train, by independent tables."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner

pytest.importorskip('mmpretrain')

ROOT = Path(__file__).resolve().parents[1] / 'configs'

# Parameters with the classifier of 1000 classes: exact numbers of the published code, SAN's and the
# paper's rule, or of timm's models (Swin); otherwise millions as published.
PARAMETERS = {
    'acmix-r26': 10_487_352,
    'acmix-r38': 14_410_192,
    'acmix-r50': 18_333_032,
    'r26': 13.7,
    'r38': 19.6,
    'r50': 25_557_032,
    'san10': 11_841_124,
    'san15': 16_181_310,
    'san19': 20_518_470,
    'acmix-san10': 11_994_612,
    'acmix-san15': 16_414_134,
    'acmix-san19': 20_829_278,
    'x-volution-r50': None,
    'pvt-t': 13.2,
    'pvt-s': 24.5,
    'acmix-pvt-t': 13,
    'acmix-pvt-s': 25,
    'swin-t': 28_288_354,
    'swin-s': 49_606_258,
    'acmix-swin-t': 28_649_908,
    'acmix-swin-s': 50_345_080,
    'conv-swin-t': None,
    'dwnet-t': 24,
    'dwnet-b': 74,
    'dynamic-dwnet-t': 51,
    'dynamic-dwnet-b': 162,
    'i-dynamic-dwnet-t': None,
}
# Of Swin-ACmix-T's 12 operators, with C and C / 32 heads, all channels together are 4416: two rates
# each; 81 numbers of a kernel for each channel, or for each of 32 head positions.
ABLATIONS = {
    'acmix-swin-t-sum': 28_649_908 - 2 * 12,
    'acmix-swin-t-complementary': 28_649_908 - 12,
    'acmix-swin-t-tensor-shift': 28_649_908 - 81 * 4416,
    'acmix-swin-t-fixed-shift': 28_649_908 - 81 * 4416,
    'acmix-swin-t-random-shift': 28_649_908,
    'acmix-swin-t-one-kernel-group': 28_649_908 - 81 * (4416 - 12 * 32),
}
# Stochastic depth by the releases of PVT, Swin and DWNet.
DROP_PATH = {
    'pvt-t': 0.1,
    'pvt-s': 0.1,
    'swin-t': 0.2,
    'swin-s': 0.3,
    'dwnet-t': 0.2,
    'dwnet-b': 0.5,
}
QUICK = {
    'acmix-r26', 'acmix-san10', 'acmix-pvt-t', 'acmix-swin-t', 'dynamic-dwnet-t',
    'acmix-swin-t-tensor-shift',
}  # fmt: skip


def batches(name: str) -> str:
    """GPUs and images of each, and epochs."""
    if 'r26' in name or 'r38' in name or 'r50' in name or 'san' in name:
        return '8xb32-100e'
    return '16xb64-300e' if 'swin' in name or name.endswith('dwnet-b') else '8xb128-300e'


def load(name: str) -> Config:
    folder = 'ablation' if name in ABLATIONS else 'imagenet'
    return Config.fromfile(ROOT / folder / f'{name}_{batches(name)}_in1k.py')


def build(cfg: Config) -> torch.nn.Module:
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def test_grid():
    """Every backbone of configs/_base_ has a recipe, but those of the authors' weights."""
    names = {path.stem for path in (ROOT / '_base_' / 'backbones').glob('*.py')}
    assert {name for name in names if not name.endswith('in1k-pre')} == set(PARAMETERS)
    files = {path.stem for path in (ROOT / 'imagenet').glob('*.py')}
    assert files == {f'{name}_{batches(name)}_in1k' for name in PARAMETERS}
    files = {path.stem for path in (ROOT / 'ablation').glob('*_in1k.py')}
    assert files == {f'{name}_{batches(name)}_in1k' for name in ABLATIONS}


@pytest.mark.parametrize('name', PARAMETERS)
def test_backbone_is_that_of_detection(name):
    """But for its start, what is frozen, what is returned and stochastic depth."""
    ours = dict(load(name).model.backbone)
    base = Config.fromfile(ROOT / '_base_' / 'backbones' / f'{name}.py')
    theirs = dict(base.backbone)
    assert ours['init_cfg'] is None
    assert not ours.get('convert_weights')
    assert not ours.get('warm_start')
    assert tuple(ours['out_indices']) == (3,)
    if 'frozen_stages' in ours:
        assert ours['frozen_stages'] == -1
        assert ours['norm_eval'] is False
    plain = name.removeprefix('acmix-').removeprefix('i-').removeprefix('dynamic-')
    assert ours.get('drop_path_rate') == DROP_PATH.get(plain.removeprefix('conv-'))
    for backbone in (ours, theirs):
        backbone['type'] = backbone['type'].removeprefix('mmdet.')
        for key in (
            'init_cfg', 'out_indices', 'frozen_stages', 'norm_eval', 'norm_cfg', 'convert_weights',
            'warm_start', 'drop_path_rate',
        ):  # fmt: skip
            backbone.pop(key, None)
    assert ours == theirs
    assert load(name).model.head.in_channels == base.channels[-1]


@pytest.mark.parametrize('name', [*PARAMETERS, *ABLATIONS])
def test_recipe(name):
    cfg = load(name)
    gpus, images = map(int, batches(name).split('-')[0].split('xb'))
    assert cfg.train_dataloader.batch_size == images
    steps = [step.type for step in cfg.train_dataloader.dataset.pipeline]
    optimizer = cfg.optim_wrapper.optimizer
    last = cfg.param_scheduler[-1]
    assert (last.type, last.end) == ('CosineAnnealingLR', cfg.train_cfg.max_epochs)
    assert last.T_max == last.end - last.begin
    assert cfg.model.head.loss.label_smooth_val == 0.1
    assert cfg.val_evaluator.topk == (1, 5)
    assert cfg.default_hooks.checkpoint.save_best == 'accuracy/top1'
    if '100e' in batches(name):
        assert gpus * images == cfg.auto_scale_lr.base_batch_size == 256
        assert cfg.train_cfg.max_epochs == 100
        assert optimizer == {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 1e-4}
        assert 'paramwise_cfg' not in cfg.optim_wrapper
        assert len(cfg.param_scheduler) == 1
        assert steps == ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'PackInputs']
        assert 'train_cfg' not in cfg.model
        return
    assert gpus * images == cfg.auto_scale_lr.base_batch_size == 1024
    assert cfg.train_cfg.max_epochs == 300
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.05)
    assert {'RandAugment', 'RandomErasing'} < set(steps)
    assert [(a.type, a.alpha) for a in cfg.model.train_cfg.augments] == [
        ('Mixup', 0.8),
        ('CutMix', 1.0),
    ]
    pvt = 'pvt' in name
    assert cfg.train_dataloader.sampler.type == ('RepeatAugSampler' if pvt else 'DefaultSampler')
    assert cfg.param_scheduler[0].end == last.begin == (5 if pvt else 20)
    assert cfg.param_scheduler[0].start_factor * optimizer.lr == pytest.approx(1e-6)
    assert last.eta_min == 1e-5
    assert cfg.optim_wrapper.clip_grad == (None if pvt else {'max_norm': 5.0})


def check_decay(model: torch.nn.Module, cfg: Config) -> None:
    """SGD decays all; the transformers' AdamW no vectors, and of position embeddings PVT's only."""
    builder = type('Builder', (), {'model': model})()
    groups = Runner.build_optim_wrapper(builder, cfg.optim_wrapper).param_groups
    decay = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    free = 0
    for name, parameter in model.named_parameters():
        vector = parameter.ndim == 1 or name.endswith('relative_position_bias_table')
        exempt = cfg.optim_wrapper.optimizer.type == 'AdamW' and vector
        assert (decay[id(parameter)] == 0) == exempt, name
        free += exempt
    assert (free > 0) == (cfg.optim_wrapper.optimizer.type == 'AdamW')


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in (*PARAMETERS, *ABLATIONS)
    ],
)
def test_builds_and_trains_a_step(name, image_folders):
    """Parameters are as published; each has a gradient, as DistributedDataParallel needs it."""
    cfg = load(name)
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = str(image_folders)
    dataset.metainfo = {'classes': tuple('abcdef')}
    for step in dataset.pipeline:
        if step.type == 'RandomResizedCrop':
            step.scale = 64
    model = build(cfg)
    count, expected = sum(p.numel() for p in model.parameters()), (PARAMETERS | ABLATIONS)[name]
    if isinstance(expected, int) and expected > 1000:
        assert count == expected
    elif expected is not None:
        assert round(count / 1e6, 1 if isinstance(expected, float) else None) == expected
    check_decay(model, cfg)

    dataset = DATASETS.build(dataset)
    model.init_weights()
    model.train()
    data = model.data_preprocessor(pseudo_collate([dataset[i] for i in (0, 9)]), training=True)
    loss = model(**data, mode='loss')['loss']
    assert loss.isfinite()
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(m.training for m in model.modules())


def test_detectors_do_without_mmpretrain():
    """Importing the package and building a detector does not import mmpretrain."""
    file = ROOT / 'acmix_resnet' / 'retinanet_acmix-r26_fpn_8xb2-1x_coco.py'
    code = f"""
import sys
sys.modules['mmpretrain'] = None
import acmix_mm
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile({str(file)!r})
init_default_scope(cfg.default_scope)
cfg.model.backbone.init_cfg = None
MODELS.build(cfg.model)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
