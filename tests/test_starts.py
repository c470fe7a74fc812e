"""Every start that docs/recipes.md promises for a recipe: from a file of its form, and a step.

Networks are narrow, by --cfg-options, and images small. Files are of random networks, in the names
of the releases, of configs/imagenet and of resnet2acmix.py.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import acmix2mm
import pytest
import releases
import resnet2acmix
import torch
import train
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint
from releases import classifier, openmmlab, parallel
from small_configs import build, shrink_config, take
from starts import CONFIGS, LONGER, STARTS, options, promised, recipes, start_of

from acmix_mm.checkpoints import read_checkpoint, state_dict_of
from acmix_mm.layers import MixedOperator
from acmix_mm.weights import check_starts, resolve_weights

RECIPES = recipes()
IMAGENET = {path.stem.split('_')[0]: path for path in CONFIGS.glob('imagenet/*.py')}
# By family: arguments of the backbone, and the widths of its stages.
NARROW = {
    'resnet': ({'base_channels': 16}, [64, 128, 256, 512]),
    'x_volution': ({'base_channels': 16}, [64, 128, 256, 512]),
    'san': ({'base_channels': 32, 'depth': 10}, [128, 256, 512, 1024]),
    'pvt': ({'embed_dims': 16, 'num_layers': '[1,2,1,1]'}, [16, 32, 80, 128]),
    'swin': ({'embed_dims': 24, 'depths': '[1,2,2,1]'}, [24, 48, 96, 192]),
    'dwnet': (
        {'arch._delete_': True, 'arch.embed_dims': 32, 'arch.depths': '[1,2,1,1]'},
        [32, 64, 128, 256],
    ),
}
PLAIN = {
    'ACmixSAN': 'SAN',
    'ACmixPyramidVisionTransformer': 'mmdet.PyramidVisionTransformer',
    'ACmixSwinTransformer': 'mmdet.SwinTransformer',
}
# What the plain network lacks.
NEW = r'.*\.(fc|dep_conv)\.(weight|bias)|.*\.rate[12]'
# By the default file's name: weights of the backbone that it lacks, and names that it does not use.
CLASSIFIER_OF_SWIN = (r'norm\d\..*', r'(norm|head)\..*|.*\.attn_mask')
KINDS = {
    r'(acmix_)?swin_\w+_patch4_window7_224': CLASSIFIER_OF_SWIN,
    r'(dynamic_)?dwnet_\w+_224': CLASSIFIER_OF_SWIN,
    r'pvt_\w+': ('', r'(norm|head)\..*|cls_token'),
    r'san\d\d_patchwise': ('', r'fc\..*'),
    r'resnet50-\w+': ('', r'fc\..*'),
}
OWN = ('', r'head\..*|neck\..*')
OWN_OF_SWIN = (r'norm[012]\..*', OWN[1])  # the classifier has the last stage's alone


def family(name: str) -> str:
    return name.split('/')[0].removeprefix('acmix_')


def network(name: str) -> str:
    """The recipe of configs/imagenet for a recipe's network, by its name there."""
    (found,) = [n for n in IMAGENET if re.search(f'[/_]{n}(-in1k-pre)?_', name)]
    return found


def command_line(family: str, config: Path, *more: str) -> Config:
    """The config that train.py makes of a family's config, narrow, and more --cfg-options."""
    backbone, widths = NARROW[family]
    narrow = {f'backbone.{key}': value for key, value in backbone.items()}
    model = Config.fromfile(config).model
    if 'head' in model:  # of a classifier
        narrow['head.in_channels'] = widths[-1]
    else:
        channels = model.get('neck', model.get('decode_head')).in_channels
        narrow.update(narrow_heads(model, channels, widths))
    options = [f'model.{key}={value}'.replace(' ', '') for key, value in narrow.items()]
    return train.build_config(train.parse_args([str(config), '--cfg-options', *options, *more]))


def narrow_heads(
    node: dict, channels: list[int], widths: list[int], prefix: str = ''
) -> Iterator[tuple[str, int | list[int]]]:
    """Options that fit what follows a backbone to its widths, and give all else 32 channels."""
    for key, value in node.items():
        if key == 'backbone':
            continue
        if key.endswith('channels'):
            if value == channels:
                yield f'{prefix}{key}', widths[-len(channels) :]  # RetinaNet takes three stages
            elif key == 'in_channels' and value == channels[-2]:  # of the auxiliary head
                yield f'{prefix}{key}', widths[2]
            else:
                yield f'{prefix}{key}', 32 if isinstance(value, int) else [32] * len(value)
        if isinstance(value, dict):
            yield from narrow_heads(value, channels, widths, f'{prefix}{key}.')
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from narrow_heads(item, channels, widths, f'{prefix}{key}.{index}.')


def random_weights(backbone: dict) -> dict:
    """Weights of a backbone, none of which are an initial value of another."""
    state = MODELS.build({k: v for k, v in backbone.items() if k != 'init_cfg'}).state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.add_(0.02 * torch.randn_like(value))
        elif name.endswith('num_batches_tracked'):
            value.fill_(7)
    return state


@functools.lru_cache(maxsize=4)
def own_file(family: str, network: str) -> tuple[dict, dict]:
    """A checkpoint of configs/imagenet for a network, and the backbone's weights."""
    weights = random_weights(command_line(family, IMAGENET[network]).model.backbone)
    channels = NARROW[family][1][-1]
    head = classifier(channels, 'head.fc')
    if family == 'pvt':
        head |= {'neck.norm.weight': torch.randn(channels), 'neck.norm.bias': torch.randn(channels)}
    return openmmlab(weights, head), weights


@functools.lru_cache(maxsize=4)
def released_file(file: str, backbone: str, channels: int) -> tuple[dict, dict]:
    """A checkpoint as its authors publish it, and the weights under our names."""
    weights = random_weights(json.loads(backbone))
    if file.startswith('pvt'):
        return releases.pvt(weights), weights
    if file.startswith('resnet50'):
        return weights | classifier(channels, 'fc'), weights
    if file.startswith('san'):
        state = parallel(weights | classifier(channels, 'fc'))
        return {'state_dict': state, 'epoch': 100, 'optimizer': {'state': {}}}, weights
    return {'model': releases.swin(weights), 'epoch': 299}, weights


@pytest.fixture(scope='module')
def convert(tmp_path_factory):
    """Runs a converter for a network; what it writes, and the backbone's weights."""

    @functools.cache
    def run(program, family: str, network: str) -> tuple[dict, dict]:
        folder = tmp_path_factory.mktemp('converted')
        files = [str(folder / 'in.pth'), str(folder / 'out.pth')]
        if program is acmix2mm:
            checkpoint, weights = own_file(family, network)
            torch.save(checkpoint, files[0])
            acmix2mm.main([*files, '--reverse'])
            return read_checkpoint(files[1]), weights
        plain = command_line(family, IMAGENET[network.removeprefix('acmix-')]).model.backbone
        torch.save(random_weights(plain) | classifier(512, 'fc'), files[0])
        resnet2acmix.main(files)
        checkpoint = read_checkpoint(files[1])
        weights = {
            name.removeprefix('backbone.'): value
            for name, value in checkpoint['state_dict'].items()
            if name.startswith('backbone.')
        }
        return checkpoint, weights

    return run


def file_for(name: str, kind: str, convert) -> tuple[dict, dict, str, str]:
    """A checkpoint, its weights by our names, names that it lacks and that it has besides."""
    both = family(name), network(name)
    backbone = command_line(family(name), CONFIGS / name).model.backbone.to_dict()
    file = backbone['init_cfg']['checkpoint'].rsplit('/')[-1]
    if kind == 'plain':
        return *convert(resnet2acmix, *both), *OWN
    if kind == 'own' or file.endswith('_in1k.pth'):
        return *own_file(*both), *(OWN_OF_SWIN if family(name) in ('swin', 'dwnet') else OWN)
    (lacks,) = [value for key, value in KINDS.items() if re.fullmatch(rf'{key}\.pth', file)]
    if file.startswith('acmix'):
        return *convert(acmix2mm, *both), *lacks
    if backbone.pop('warm_start', False):
        backbone['type'] = PLAIN[backbone['type']]
        lacks = (f'{lacks[0]}|{NEW}' if lacks[0] else NEW, lacks[1])
    channels = NARROW[family(name)][1][-1]
    del backbone['init_cfg']
    return *released_file(file, json.dumps(backbone, sort_keys=True), channels), *lacks


def check_loaded(model: torch.nn.Module, file: tuple[dict, dict, str, str]) -> None:
    """Every weight is the file's, but those that it lacks; the others in it are not used."""
    checkpoint, weights, lacks, besides = file
    loaded = model.backbone.state_dict()
    other = {n for n, v in loaded.items() if n not in weights or not torch.equal(v, weights[n])}
    assert other == {n for n in loaded if re.fullmatch(lacks, n)}
    # All values are random: a weight is used if its last ones are found somewhere.
    tails = {
        name: value.flatten()[-4:]
        for name, value in state_dict_of(checkpoint).items()
        if value.is_floating_point()
    }
    wanted = torch.cat(list(tails.values())).sort().values
    values = torch.cat([v.flatten() for v in loaded.values() if v.is_floating_point()])
    nearest = wanted[torch.searchsorted(wanted, values).clamp_max(len(wanted) - 1)]
    there = set(values[nearest == values].tolist())
    unused = {name for name, tail in tails.items() if not there.issuperset(tail.tolist())}
    assert unused == {name for name in tails if re.fullmatch(besides, name)}


def check_random(model: torch.nn.Module, cfg: Config) -> None:
    """Nothing is frozen, statistics are learnt, and the schedule is longer."""
    assert cfg.model.backbone.init_cfg is None
    assert not cfg.get('load_from')
    assert all(p.requires_grad for p in model.parameters())
    model.train()
    assert all(module.training for module in model.modules())
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert (
        length == cfg.param_scheduler[-1].end == (72 if 'max_epochs' in cfg.train_cfg else 320_000)
    )
    assert max(cfg.param_scheduler[-1].get('milestones', [0])) < length


def train_step(model: torch.nn.Module, cfg: Config) -> None:
    wrapper = dict(cfg.optim_wrapper, type='OptimWrapper')  # the other one needs a GPU
    wrapper.pop('loss_scale', None)
    optimizer = Runner.build_optim_wrapper(type('Builder', (), {'model': model})(), wrapper)
    model.train()
    losses = model(**model.data_preprocessor(take(cfg.train_dataloader, 2), True), mode='loss')
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    optimizer.backward(loss)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer.step()
    assert all(p.isfinite().all() for p in trained.values())
    assert any('backbone' in n and not torch.equal(p, before[n]) for n, p in trained.items())


def quick() -> set[tuple[str, str]]:
    """For every row of the table one recipe of every kind of start, of several heads."""
    cases = set()
    for start in STARTS:
        names = [name for name in RECIPES if start.fits(name)]
        for i, kind in enumerate(promised(names[0])):
            cases.add((names[(i * len(names)) // 4], kind))
    return cases


QUICK = quick()


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in QUICK else [pytest.mark.slow])
        for name in RECIPES
        for kind in promised(name)
    ],
)
def test_loads_and_trains(name, kind, scene_digits, convert, tmp_path, monkeypatch):
    """What the command line of docs/recipes.md starts from, as train.py does."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'checkpoints').mkdir()
    init_default_scope('mmdet')
    file = None if kind == 'random' else file_for(name, kind, convert)
    path = 'mine.pth'
    if kind == 'default':
        url = Config.fromfile(CONFIGS / name).model.backbone.init_cfg.checkpoint
        path = f'checkpoints/{url.rsplit("/")[-1]}'  # it takes precedence over a URL
    if file:
        torch.save(file[0], path)
    line = options(name, kind).replace('FILE', path)
    cfg = command_line(family(name), CONFIGS / name, *line.split())
    resolve_weights(cfg)
    check_starts(cfg)
    start = cfg.model.backbone.init_cfg or {'checkpoint': cfg.get('load_from')}
    assert start['checkpoint'] == (path if file else None)

    model = build(shrink_config(cfg, scene_digits))
    model.init_weights()
    if cfg.get('load_from'):
        load_checkpoint(model, cfg.load_from)
    if file:
        check_loaded(model, file)
    else:
        check_random(model, cfg)
    rates = {
        (m.rate1.item(), m.rate2.item())
        for m in model.modules()
        if isinstance(m, MixedOperator) and m.mix == 'learned'
    }
    warm = start_of(name).plain == '' and kind == 'default'
    assert (rates == {(1, 0)}) == warm
    train_step(model, cfg)


@pytest.mark.parametrize('name', RECIPES)
def test_default_start(name):
    backbone = Config.fromfile(CONFIGS / name).model.backbone
    assert re.fullmatch(start_of(name).checkpoint, backbone.init_cfg.checkpoint)
    # Files of this project's own training have the classifier's names around the backbone's.
    assert (backbone.init_cfg.get('prefix') == 'backbone.') == (
        '_in1k' in backbone.init_cfg.checkpoint
    )


def test_documented():
    """The table of docs/recipes.md has the lines that are tested."""
    page = (CONFIGS.parent / 'docs/recipes.md').read_text()
    rows = [line for line in page.splitlines() if line.startswith('|')]
    for start in STARTS:
        lines = [line for line in (start.own, start.plain, start.random) if line]
        assert any(all(f'`{line}`' in row for line in lines) for row in rows), start.recipes
    for line in LONGER.values():
        assert f'`{line}`' in page
