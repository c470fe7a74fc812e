"""ACmix in models that the paper does not have: example configs, and the table to make more."""

import re

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from mmengine.runner import Runner
from small_configs import build, shrink, take
from starts import CONFIGS

from acmix_mm.analysis.networks import without_checkpoints
from acmix_mm.command_line import load_config
from acmix_mm.layers.mixed_operator import MixedOperator
from acmix_mm.openmmlab import BACKBONES

NAMES = sorted(path.stem for path in CONFIGS.glob('other_models/*.py'))
QUICK = [name for name in NAMES if name.startswith(('rtmdet', 'acmix-pvt'))]
PAGE = CONFIGS.parent / 'docs' / 'other_models.md'


def test_there_are_all():
    models = {re.sub(r'acmix-\w+(-[std]\d?)?_|_.*', '', name) for name in NAMES}
    expected = {'rtmdet', 'yolox', 'dino-4scale', 'mask2former', 'fcos', 'deeplabv3plus'}
    assert models == expected | {'segformer'}


@pytest.mark.parametrize('name', NAMES)
def test_first_comment_names_the_recipe(name):
    text = (CONFIGS / 'other_models' / f'{name}.py').read_text()
    assert re.match(r"# \S+'s recipe \((MMDetection|MMSegmentation)\),", text)


@pytest.mark.parametrize(
    'name', [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in NAMES]
)
def test_trains_a_step_and_predicts(name, scene_digits):
    """On a few pixels of the very small data set, by the config's optimiser."""
    cfg = load_config(str(CONFIGS / 'other_models' / f'{name}.py'))
    detector = cfg.default_scope == 'mmdet'
    data = 'semantic' if not detector else 'instance' if 'mask2former' in name else 'detection'
    data = Config.fromfile(CONFIGS / '_base_' / 'datasets' / f'scene_digits_{data}.py')
    for loader in (data.train_dataloader, data.test_dataloader):
        loader.dataset.data_root = str(scene_digits / ('coco' if detector else 'ade'))
        shrink(loader.dataset.pipeline)
    processing = cfg.model.data_preprocessor
    processing.pop('batch_augments', None)  # to the size of the recipe
    if 'num_queries' in cfg.model:
        cfg.model.num_queries = 20  # chosen from the positions of the maps
    if not detector:
        processing.size = (64, 64)
    cfg.model = ConfigDict(without_checkpoints(cfg.model.to_dict()))
    model = revert_sync_batchnorm(build(cfg)).train()
    model.init_weights()
    assert any(isinstance(module, MixedOperator) for module in model.modules())
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    builder = type('Builder', (), {'model': model})()
    optimizer = Runner.build_optim_wrapper(builder, dict(cfg.optim_wrapper))
    losses = model.train_step(take(data.train_dataloader, 2), optimizer)
    assert torch.isfinite(losses['loss'])
    after = dict(model.named_parameters())
    moved = {n for n, value in before.items() if not torch.equal(value, after[n])}
    # The first step is small; and nothing comes back through residual branches that start at 0.
    assert len(moved) > 0.3 * len(before)
    assert any(n.startswith('backbone.') for n in moved)

    with torch.no_grad():
        (sample,) = model.eval().test_step(take(data.test_dataloader, 1))
    if detector:
        assert sample.pred_instances.scores.isfinite().all()
    else:
        assert sample.pred_sem_seg.shape == (96, 96)


def test_rates_of_mask2former_do_not_decay():
    (name,) = [name for name in NAMES if name.startswith('mask2former')]
    cfg = Config.fromfile(CONFIGS / 'other_models' / f'{name}.py')
    builder = type('Builder', (), {'model': build(cfg)})()
    groups = Runner.build_optim_wrapper(builder, dict(cfg.optim_wrapper)).param_groups
    group_of = {id(parameter): group for group in groups for parameter in group['params']}
    rates = [
        group_of[id(parameter)]
        for name, parameter in builder.model.named_parameters()
        if name.endswith(('rate1', 'rate2'))
    ]
    assert len(rates) == 2 * 12
    assert {(group['lr'], group['weight_decay']) for group in rates} == {(1e-5, 0.0)}


def rows() -> list[list[str]]:
    """The table of the page: backbone, channels, strides, how sizes are rounded."""
    table = PAGE.read_text().split('| backbone |')[1].split('\n\n')[0]
    return [
        [cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]
    ]


def test_table_has_every_backbone():
    classes = {re.match(r'`(\w+)\(', row[0])[1] for row in rows()}
    assert classes == {*BACKBONES}


@torch.no_grad()
@pytest.mark.parametrize('row', rows(), ids=lambda row: row[0])
def test_table_of_backbones(row, monkeypatch):
    for method in ('uniform_', 'normal_'):  # no matter here, and most of the time
        monkeypatch.setattr(torch.Tensor, method, lambda tensor, *args, **kwargs: tensor)
    call, channels, strides, rounding = row
    kind, arguments, depths = re.fullmatch(r'`(\w+)\((.*)\)`(.*)', call).groups()
    channels, strides = ([int(n) for n in numbers.split(', ')] for numbers in (channels, strides))
    sign = {'up': -1, 'down': 1}[rounding]
    arguments = eval(f'dict({arguments})')
    for depth in [{}, *({'depth': int(depth)} for depth in re.findall(r'\d+', depths))]:
        backbone = MODELS.get(kind)(**(arguments | depth)).to('meta').eval()
        for side in (64, 61):  # 32 divides one of them
            maps = backbone(torch.empty(1, 3, side, 96, device='meta'))
            assert [m.size(1) for m in maps] == channels
            sizes = [(sign * (sign * side // s), 96 // s) for s in strides]
            assert [tuple(m.shape[-2:]) for m in maps] == sizes
    assert len(backbone(torch.empty(1, 3, 1, 1, device='meta'))) == len(strides)
