"""Every config of the repository trains and predicts; users' configs inherit mmdet's and ours."""

import copy
import functools
import inspect
import itertools
import json
import random
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from small_configs import build, shrink, shrink_config, take
from starts import CONFIGS as ROOT
from starts import recipes

from acmix_mm.backbones import ACmixResNet, DWNet
from acmix_mm.layers.mixed_operator import MIX_MODES, SHIFTS

RECIPES = recipes()
# Of detectors and segmentors: METHOD_BACKBONE_..., as the recipes.
DEMOS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('demo/*_*_scene-digits.py'))
ABLATIONS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob('ablation/*_scene-digits.py'))
# More about them in test_imagenet_configs.py.
CLASSIFIERS = sorted(
    {
        str(p.relative_to(ROOT))
        for folder in ('imagenet', 'demo', 'ablation')
        for p in ROOT.glob(f'{folder}/*.py')
    }
    - {*DEMOS, *ABLATIONS}
)
HEADS = ('retinanet', 'mask-rcnn', 'cascade-rcnn', 'cascade-mask-rcnn')
SIZES = {
    'resnet': ['r50'],
    'san': ['san19'],
    'pvt': ['pvt-t', 'pvt-s'],
    'swin': ['swin-t', 'swin-s'],
}


@functools.cache
def _read(name: str) -> Config:
    return Config.fromfile(ROOT / name)


def read(name: str) -> Config:
    """A config by its path under configs/."""
    return copy.deepcopy(_read(name))


def family(name: str) -> str:
    folder = name.split('/')[0].removeprefix('acmix_')
    return 'swin' if folder == 'dwnet' else folder  # whose recipe DWNet's authors take


def head_of(name: str) -> str:
    file = name.split('/')[1]
    return file.split('_')[1 if 'ade20k' in name else 0]


def grid(mixed: str) -> set[str]:
    """The recipes that there are with ACmix ('acmix') and without ('')."""
    folder, mixed = (mixed and f'{mixed}_'), (mixed and f'{mixed}-')
    names = {
        f'{folder}{family}/{head}_{mixed}{size}_fpn_8xb2-{length}_coco.py'
        for family, sizes in SIZES.items()
        for size in sizes
        for head in HEADS
        for length in (['1x'] if family in ('resnet', 'san') else ['1x', '3x'])
    } | {
        f'{folder}{family}/{mixed}{size}_{head}_ade20k-512x512.py'
        for family, sizes in SIZES.items()
        for size in sizes
        for head in ('fpn_8xb2-80k', 'upernet_8xb2-160k')
    }
    assert len(names) == 40 + 12
    names |= {
        f'{folder}swin/{head}_{mixed}swin-{size}_fpn_8xb2-amp-{length}_coco.py'
        for head in ('mask-rcnn', 'cascade-mask-rcnn')
        for size in 'ts'
        for length in ('1x', '3x')
    }
    return names | {
        f'{folder}{family}/{head}_{mixed}{size}_fpn_8xb2-1x_coco.py'
        for family, head, sizes in (
            ('resnet', 'retinanet', ('r26', 'r38')),
            ('resnet', 'faster-rcnn', ('r26', 'r38', 'r50')),
            ('san', 'retinanet', ('san10', 'san15')),
        )
        for size in sizes
    }


def test_grid():
    """Every backbone has a config with every head, with ACmix and without."""
    expected = grid('acmix') | grid('')
    expected |= {
        f'acmix_swin/{name}.py'
        for size in ('acmix-swin-t-in1k-pre', 'acmix-swin-s-in1k-pre')
        for name in (
            f'mask-rcnn_{size}_fpn_8xb2-1x_coco',
            f'mask-rcnn_{size}_fpn_8xb2-3x_coco',
            f'cascade-mask-rcnn_{size}_fpn_8xb2-1x_coco',
            f'cascade-mask-rcnn_{size}_fpn_8xb2-3x_coco',
            f'{size}_upernet_8xb2-160k_ade20k-512x512',
        )
    }
    expected.add('acmix_swin/mask-rcnn_conv-swin-t_fpn_8xb2-1x_coco.py')
    expected |= {
        f'dwnet/{head}_{dynamic}dwnet-t_fpn_8xb2-1x_coco.py'
        for head in ('retinanet', 'mask-rcnn')
        for dynamic in ('', 'dynamic-')
    }
    expected.add('dwnet/retinanet_i-dynamic-dwnet-t_fpn_8xb2-1x_coco.py')
    expected |= {
        f'dwnet/{name}.py'
        for size in ('dwnet-t', 'dwnet-b', 'dynamic-dwnet-t', 'dynamic-dwnet-b')
        for name in (
            f'cascade-mask-rcnn_{size}_fpn_8xb2-3x_coco',
            f'{size}_upernet_8xb2-160k_ade20k-512x512',
        )
    }
    expected |= {
        f'x_volution/{head}_x-volution-r50_fpn_8xb2-1x_coco.py'
        for head in ('retinanet', 'mask-rcnn')
    }
    assert set(RECIPES) == expected


SOURCE = re.compile(
    r"ACmix, appendix \((the paper's pair|the plain network of the paper's pair)\)"
    r"|(Swin|PVT|DWNet)'s release|This project's choice: \w"
)


@pytest.mark.parametrize('name', RECIPES)
def test_first_comment_names_the_source(name):
    comment = (ROOT / name).read_text().split('_base_')[0]
    assert comment.startswith('# ')
    assert SOURCE.match(comment[2:].replace('\n# ', ' ')), comment
    papers = {
        'resnet': ['retinanet'], 'san': ['retinanet'], 'pvt': ['retinanet', 'fpn'],
        'swin': ['mask-rcnn', 'cascade-mask-rcnn', 'upernet'],
    }  # fmt: skip
    if name.startswith('acmix_') and 'conv-swin' not in name:
        papers_own = head_of(name) in papers[family(name)]
        if family(name) == 'pvt' and '-3x_' in name:
            papers_own = False
        assert ("(the paper's pair)" in comment) == papers_own


@pytest.mark.parametrize('name', [*RECIPES, *DEMOS, *ABLATIONS, *CLASSIFIERS])
def test_nothing_stale(name):
    """The keys of a config are what is read of it; the pipelines are those of the data sets."""
    known = {*inspect.signature(Runner.__init__).parameters, 'custom_imports', 'auto_scale_lr'}
    known |= {'tta_model', 'tta_pipeline', 'train_pipeline', 'test_pipeline'}
    known |= {'dataset_type', 'data_root', 'metainfo'}
    cfg = read(name)
    assert set(cfg) <= known
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    assert cfg.train_pipeline == train.pipeline
    assert cfg.test_pipeline == test.pipeline == cfg.val_dataloader.dataset.pipeline
    for key, value in (('type', cfg.dataset_type), ('data_root', cfg.data_root)):
        assert train[key] == test[key] == value
    if 'metainfo' in cfg:
        assert train.metainfo == test.metainfo == cfg.metainfo
    # Upstream leaves seeds free; demos are to repeat.
    assert cfg.get('randomness') == ({'seed': 0} if 'scene-digits' in name else None)


def exempt(model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """What has no weight decay in the families' releases.

    Swin's and DWNet's exempt what is called norm, and that is not the batch norms of DWNet's blocks
    and of heads; with it the two rates, as ACmix's release of Swin does. PVT's exempts nothing.
    """
    backbone = model.backbone
    if not isinstance(backbone, SwinTransformer):  # DWNet is one
        return
    for module in backbone.modules():
        if isinstance(module, torch.nn.LayerNorm):
            yield from module.parameters()
        for name, parameter in module.named_parameters(recurse=False):
            if name in ('relative_position_bias_table', 'rate1', 'rate2'):
                yield parameter
    if isinstance(backbone, DWNet):
        for i in backbone.out_indices:
            yield from getattr(backbone, f'norm{i}').parameters()


def check_decay(model: torch.nn.Module, cfg: Config) -> None:
    wrapper = dict(cfg.optim_wrapper, type='OptimWrapper')  # the other one needs a GPU
    wrapper.pop('loss_scale', None)
    groups = Runner.build_optim_wrapper(type('Builder', (), {'model': model})(), wrapper)
    decay = {
        id(parameter): group['weight_decay']
        for group in groups.param_groups
        for parameter in group['params']
    }
    base = cfg.optim_wrapper.optimizer.weight_decay
    assert base > 0
    free = {id(parameter) for parameter in exempt(model)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert decay[id(parameter)] == (0 if id(parameter) in free else base), name


def structure(cfg: Config) -> str:
    """What recipes of the same network and head have in common."""
    model = copy.deepcopy(cfg.model.to_dict())
    for key in ('init_cfg', 'warm_start', 'convert_weights', 'drop_path_rate'):
        model['backbone'].pop(key, None)
    return json.dumps(model, sort_keys=True)


@pytest.mark.parametrize('folder', sorted({name.split('/')[0] for name in RECIPES}))
def test_builds(folder, monkeypatch):
    """All recipes of a folder, with weight decay where it should be."""
    for method in ('uniform_', 'normal_'):  # no matter here, and half of the time
        monkeypatch.setattr(torch.Tensor, method, lambda tensor, *args, **kwargs: tensor)
    names = [name for name in RECIPES if name.startswith(f'{folder}/')]
    names.sort(key=lambda name: structure(read(name)))
    for _, same in itertools.groupby(names, lambda name: structure(read(name))):
        model, checked = None, []
        for name in same:
            cfg = read(name)
            model = model or build(cfg)
            if cfg.optim_wrapper not in checked:
                check_decay(model, cfg)
                checked.append(cfg.optim_wrapper)


# Of each kind of network of this project with each head the last by name, which is a small one.
NEW = {
    (name.split('/')[0], *re.findall('i-dynamic|dynamic|conv', name), head_of(name)): name
    for name in RECIPES
    if not name.startswith(('resnet/', 'pvt/', 'swin/')) and '-amp-' not in name
}


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(n, marks=[pytest.mark.slow] if n in {*RECIPES} - {*NEW.values()} else [])
        for n in (*DEMOS, *ABLATIONS, *RECIPES)
        if '-amp-' not in n  # needs a GPU
    ],
)
def test_trains_and_predicts(name, scene_digits):
    """One loss, with a gradient for all that is trained, and one prediction."""
    cfg = shrink_config(read(name), scene_digits)
    assert cfg.custom_imports.imports == ['acmix_mm']
    model = build(cfg)
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
    name = 'acmix_swin/acmix-swin-t_fpn_8xb2-80k_ade20k-512x512.py'
    scales = [step.scale for step in read(name).tta_pipeline[1].transforms[0]]
    assert [scale[1] for scale in scales] == [256, 384, 512, 640, 768, 896]
    assert {long / short for long, short in scales} == {4}
    cfg = shrink_config(read(name), scene_digits)
    cfg.test_dataloader.dataset.pipeline = shrink(cfg.tta_pipeline)
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    model = build(cfg).eval()
    batch = take(cfg.test_dataloader, 1)
    assert len(batch['inputs']) == 12
    with torch.no_grad():
        (sample,) = model.test_step(batch)
    assert sample.pred_sem_seg.shape == (96, 96)


@pytest.mark.parametrize('pipeline', ['train', 'test', 'tta'])
def test_ade20k_labels_are_as_with_reduction_in_the_transforms(pipeline, scene_digits):
    """The data set alone decides that label 0 is of no class."""
    init_default_scope('mmseg')
    found = []
    for reduce in (None, True):
        cfg = read('acmix_swin/acmix-swin-t_fpn_8xb2-80k_ade20k-512x512.py')
        dataset = cfg.train_dataloader.dataset
        dataset.data_root, dataset.pipeline = str(scene_digits / 'ade'), cfg[f'{pipeline}_pipeline']
        steps = [*dataset.pipeline]
        if pipeline == 'tta':
            steps = [step for branch in dataset.pipeline[1].transforms for step in branch]
        (loading,) = [step for step in steps if step.type == 'LoadAnnotations']
        assert 'reduce_zero_label' not in loading
        if reduce:
            loading.reduce_zero_label = True
        np.random.seed(0)  # noqa: NPY002, the generator of transforms
        random.seed(0)
        sample = DATASETS.build(dataset)[0]['data_samples']
        sample = sample[0] if pipeline == 'tta' else sample
        found.append(sample.gt_sem_seg.data)
    assert torch.equal(*found)
    original = Image.open(scene_digits / 'ade/annotations/training/000000000001.png')
    values = {*np.unique(original).tolist()}
    assert 0 in values  # which becomes 255, and the others one less
    assert {*found[0].unique().tolist()} <= {255, *(v - 1 for v in values if v)}
    if pipeline != 'train':
        reduced = np.asarray(original, int) - 1
        np.testing.assert_array_equal(found[0][0], np.where(reduced < 0, 255, reduced))


@pytest.mark.parametrize('name', [n for n in RECIPES if 'pvt' in n and 'ade20k' in n])
def test_pvt_is_tested_on_multiples_of_32(name, scene_digits):
    """An image of 96x96 at a shorter side of 80 pixels becomes 96x96, with --tta too."""
    cfg = read(name)
    for pipeline in (cfg.test_pipeline, cfg.tta_pipeline):
        dataset = copy.deepcopy(cfg.test_dataloader.dataset)
        dataset.data_root = str(scene_digits / 'ade')
        dataset.pipeline = pipeline
        for step in [*pipeline, *(pipeline[1].get('transforms') or [[]])[0]]:
            if 'scale' in step:
                step.scale = (320, 80)
        sample = DATASETS.build(dataset)[0]
        inputs = sample['inputs'] if pipeline is cfg.tta_pipeline else [sample['inputs']]
        assert {tuple(image.shape) for image in inputs} == {(3, 96, 96)}
        label = sample['data_samples']
        label = label[0] if pipeline is cfg.tta_pipeline else label
        assert (label.img_shape, label.ori_shape) == ((96, 96), (96, 96))
    assert not [step for step in cfg.train_pipeline if step.type == 'ResizeToMultiple']


# By family: optimiser, learning rate, weight decay, warm-up iterations.
COCO = {
    'resnet': ('SGD', 0.01, 1e-4, 500),
    'san': ('SGD', 0.01, 1e-4, 500),
    'x_volution': ('SGD', 0.01, 1e-4, 500),
    'pvt': ('AdamW', 1e-4, 1e-4, 500),
    'swin': ('AdamW', 1e-4, 0.05, 500),
}
ADE20K = {
    'resnet': ('SGD', 0.01, 5e-4, 0),
    'san': ('SGD', 0.01, 5e-4, 0),
    'pvt': ('AdamW', 1e-4, 1e-4, 0),
    'swin': ('AdamW', 6e-5, 0.01, 1500),
}


@pytest.mark.parametrize('name', [name for name in RECIPES if name.endswith('_coco.py')])
def test_coco_recipe(name):
    """ACmix (CVPR 2022), appendix, and the families' releases."""
    cfg = read(name)
    warmup, steps = cfg.param_scheduler
    optimizer = cfg.optim_wrapper.optimizer
    recipe = (optimizer.type, optimizer.lr, optimizer.weight_decay, warmup.end)
    expected = COCO[family(name)]
    if (family(name), head_of(name)) == ('pvt', 'mask-rcnn'):
        expected = ('AdamW', 2e-4, 1e-4, 500)
    assert recipe == expected
    assert optimizer.get('betas', (0.9, 0.999)) == (0.9, 0.999)
    assert (warmup.type, warmup.by_epoch, warmup.start_factor) == ('LinearLR', False, 0.001)
    epochs, milestones = (36, [27, 33]) if '-3x_' in name else (12, [8, 11])
    assert cfg.train_cfg.max_epochs == steps.end == epochs
    assert (steps.milestones, steps.gamma) == (milestones, 0.1)
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    train, test = (x.dataset for x in (cfg.train_dataloader, cfg.test_dataloader))
    assert train.data_root == test.data_root == 'data/coco/'
    assert [t.scale for t in test.pipeline if t.type == 'Resize'] == [(1333, 800)]
    if '-3x_' in name or family(name) == 'swin':
        (choice,) = [t for t in train.pipeline if t.type == 'RandomChoice']
        (whole,), (first, crop, enlarge) = choice.transforms
        assert whole == enlarge
        assert sorted(whole.scales) == [(side, 1333) for side in range(480, 801, 32)]
        assert first.scales == [(400, 1333), (500, 1333), (600, 1333)]
        assert (crop.crop_type, crop.crop_size) == ('absolute_range', (384, 600))
    else:
        assert [t.scale for t in train.pipeline if t.type == 'Resize'] == [(1333, 800)]


def test_coco_checkpoints():
    """As mmdet: one an epoch; what papers report is the last. The best is there, too."""
    hook = read('acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py').default_hooks.checkpoint
    assert hook == {'type': 'CheckpointHook', 'interval': 1, 'save_best': 'auto'}


@pytest.mark.parametrize('name', [name for name in RECIPES if 'ade20k' in name])
def test_ade20k_recipe(name):
    """ACmix (CVPR 2022), appendix; SGD as in MMSegmentation's ResNet configs."""
    cfg = read(name)
    hook = cfg.default_hooks.checkpoint
    assert (hook.max_keep_ckpts, hook.save_best) == (2, 'mIoU')
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


@pytest.mark.parametrize('name', [n for n in RECIPES if family(n) in ('swin', 'pvt')])
def test_drop_path(name):
    """As Swin's release, and DWNet's; PVT's has 0.1, which is the network's default in mmdet."""
    backbone = read(name).model.backbone
    if family(name) == 'pvt':
        assert 'drop_path_rate' not in backbone
    elif 'ade20k' in name:
        assert backbone.drop_path_rate == 0.3
    elif '-3x_' in name:
        assert backbone.drop_path_rate == (0.3 if 'dwnet-b' in name else 0.2)
    else:
        assert backbone.drop_path_rate == (0.0 if 'cascade' in head_of(name) else 0.1)


@pytest.mark.parametrize('name', [n for n in RECIPES if '-amp-' in n])
def test_mixed_precision(name):
    """The recipe of the same name, with AMP and a loss scale that adapts."""
    amp, full = (read(n).to_dict() for n in (name, name.replace('-amp-', '-')))
    wrapper = amp['optim_wrapper']
    assert wrapper.pop('type') == 'AmpOptimWrapper'
    assert wrapper.pop('loss_scale') == 'dynamic'
    assert full['optim_wrapper'].pop('type') == 'OptimWrapper'
    assert amp == full


PLAIN = {
    'ACmixResNet': 'mmdet.ResNet',
    'ACmixSAN': 'SAN',
    'ACmixPyramidVisionTransformer': 'mmdet.PyramidVisionTransformer',
    'ACmixSwinTransformer': 'mmdet.SwinTransformer',
}


@pytest.mark.parametrize('name', sorted(grid('acmix')))
def test_pairs_differ_in_the_operator_only(name):
    plain_name = name.replace('acmix_', '').replace('acmix-', '')
    mixed, plain = (read(n).to_dict() for n in (name, plain_name))
    ours, theirs = (cfg['model'].pop('backbone') for cfg in (mixed, plain))
    assert plain == mixed
    same_file = ours.pop('init_cfg') == theirs.pop('init_cfg')
    # From the plain network's weights, or from own ones.
    assert ours.pop('warm_start', False) == same_file == (family(name) != 'resnet')
    if re.search('_r(26|38)_', plain_name):  # which mmdet does not have
        assert theirs.pop('stage_with_acmix') == (False,) * 4
    else:
        assert theirs.pop('type') == PLAIN[ours.pop('type')]
    assert ours == theirs


@pytest.mark.parametrize('name', [n for n in RECIPES if 'in1k-pre' in n])
def test_released_weights_in_the_same_recipe(name):
    released, warm = (read(n).to_dict() for n in (name, name.replace('-in1k-pre', '')))
    ours, theirs = (cfg['model']['backbone'] for cfg in (released, warm))
    assert ours.pop('init_cfg') != theirs.pop('init_cfg')
    assert not ours.pop('warm_start')
    assert theirs.pop('warm_start')
    assert released == warm


@pytest.mark.parametrize(
    ('size', 'arguments'),
    [
        (size, {key: value, **more})
        for family, key, more, values in (
            ('r', 'depth', {}, {'26': 26, '38': 38, '50': 50}),
            ('san', 'depth', {}, {'10': 10, '15': 15, '19': 19}),
            ('pvt', 'num_layers', {}, {'-t': [2, 2, 2, 2], '-s': [3, 4, 6, 3]}),
            ('swin', 'depths', {'embed_dims': 96, 'num_heads': [3, 6, 12, 24], 'window_size': 7},
             {'-t': [2, 2, 6, 2], '-s': [2, 2, 18, 2]}),
            ('dwnet', 'arch', {}, {'-t': 'tiny', '-b': 'base'}),
        )
        for suffix, value in values.items()
        for size in [f'{family}{suffix}']
    ],
)  # fmt: skip
def test_sizes(size, arguments):
    """Of the network and, where weights are public, of the file."""
    names = [n for n in RECIPES if re.search(f'[/_-]{size}(-in1k-pre)?_', n)]
    assert len(names) >= 2
    words = {'t': ('tiny',), 's': ('small',), 'b': ('base',)}.get(size[-1], (size,))
    for name in names:
        backbone = read(name).model.backbone
        assert {key: backbone[key] for key in arguments} == arguments
        file = backbone.init_cfg.checkpoint.rsplit('/')[-1]
        assert '_in1k' in file or any(
            word in file for word in (*words, size.replace('r50', 'resnet50'))
        )


def test_plain_resnet_is_resnet():
    """Of 26 and 38 blocks: the parameters that SAN's authors print for them, in millions."""
    for depth, millions in ((26, 13.7), (38, 19.6)):
        cfg = read(f'resnet/retinanet_r{depth}_fpn_8xb2-1x_coco.py')
        backbone = MODELS.build(dict(cfg.model.backbone, init_cfg=None))
        classifier = 2048 * 1000 + 1000
        count = sum(p.numel() for p in backbone.parameters()) + classifier
        assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize('name', [name for name in RECIPES if name.startswith('dwnet/')])
def test_dwnets(name):
    """Kind of network and the file of its weights, as its authors name it."""
    backbone = read(name).model.backbone
    kind = 'homogeneous' if 'dynamic-' in name else None
    if 'i-dynamic-' in name:
        kind = 'inhomogeneous'  # of which there are no public weights
    assert backbone.get('dynamic') == kind
    file = backbone.init_cfg.checkpoint.rsplit('/')[-1]
    prefix = {'inhomogeneous': 'i-dynamic-', 'homogeneous': 'dynamic_', None: ''}[kind]
    assert file.startswith(f'{prefix}dwnet')
    assert backbone.convert_weights == (kind != 'inhomogeneous')


@pytest.mark.parametrize('name', [name for name in DEMOS if name.startswith('demo/retinanet')])
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


OPTIONS = {
    'attention': {'mix': 'attention'},
    'conv': {'mix': 'conv'},
    'sum': {'mix': 'sum'},
    'complementary': {'mix': 'complementary'},
    'tensor-shift': {'shift': 'tensor'},
    'fixed-shift': {'shift': 'fixed'},
    'random-shift': {'shift': 'random'},
    'one-kernel-group': {'kernel_groups': 1},
}


def test_ablations():
    """One for each value that the demo does not have; of Swin-ACmix-T but the single paths.

    Those are configs/imagenet's Swin-T and Conv-Swin-T.
    """
    values = {(key, value) for options in OPTIONS.values() for key, value in options.items()}
    assert {v for key, v in values if key == 'mix'} == set(MIX_MODES) - {'learned'}
    assert {v for key, v in values if key == 'shift'} == set(SHIFTS) - {'learned'}
    swin = {f'acmix-swin-t-{name}_16xb64-300e_in1k.py' for name in OPTIONS} - {
        f'acmix-swin-t-{name}_16xb64-300e_in1k.py' for name in ('attention', 'conv')
    }
    digits = {f'retinanet_acmix-r26-{name}_fpn_scene-digits.py' for name in OPTIONS}
    assert {path.name for path in ROOT.glob('ablation/*.py')} == swin | digits
    bases = {
        'retinanet_acmix-r26': 'demo/retinanet_acmix-r26_fpn_scene-digits.py',
        'acmix-swin-t': 'imagenet/acmix-swin-t_16xb64-300e_in1k.py',
    }
    for path in ROOT.glob('ablation/*.py'):
        (kind,) = [kind for kind in bases if path.name.startswith(kind)]
        ours, theirs = (read(file).to_dict() for file in (f'ablation/{path.name}', bases[kind]))
        options = OPTIONS[path.name.removeprefix(f'{kind}-').split('_')[0]]
        assert {key: ours['model']['backbone'].pop(key) for key in options} == options
        assert ours == theirs


def test_ablations_say_whose_they_are():
    for path in ROOT.glob('ablation/*.py'):
        comment = path.read_text().split('_base_')[0]
        assert re.match(r'# .*\(ACmix, section \d\.\d', comment), path.name


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
