"""Checkpoints and models: what fits; those from which models start, found or refused."""

import argparse
import re
import sys
import types
from pathlib import Path

import compare
import hostile
import predict
import pytest
import releases
import torch
import train
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from releases import parallel

from acmix_mm import deploy
from acmix_mm.backbones import ACmixResNet, ACmixSwinTransformer
from acmix_mm.checkpoints import read_checkpoint
from acmix_mm.command_line import build_model, check_weights, load_checkpoint, load_config
from acmix_mm.weights import check_classes, check_starts, misfit, resolve_weights

NOWHERE = 'http://127.0.0.1:9/weights.pth'  # the port of a service that no machine offers
CONFIG = Path('configs/demo/retinanet_acmix-r26_fpn_scene-digits.py')
RESNET = {'type': 'ACmixResNet', 'depth': 26, 'base_channels': 16}
SWIN = {'embed_dims': 12, 'depths': (1, 1, 1, 1), 'num_heads': (3, 3, 6, 12)}


@pytest.fixture
def write(tmp_path):
    """Writes a checkpoint that cannot serve; its message."""

    def damaged(kind: str) -> tuple[str, str]:
        file = tmp_path / 'bad.pth'
        state = ACmixResNet(26, base_channels=16).state_dict()
        if kind == 'truncated':
            torch.save({'state_dict': state}, file)
            file.write_bytes(file.read_bytes()[:-1000])
        elif kind == 'garbage':
            file.write_text('not a checkpoint')
        elif kind == 'no weights':
            torch.save({'state_dict': {}, 'meta': {}}, file)
        elif kind == 'of another network':
            torch.save({'model': ACmixSwinTransformer(**SWIN).state_dict()}, file)
        elif kind == 'with code':
            hostile.FILES['meta'](file, tmp_path / 'it-ran')
        messages = {
            'missing': r'checkpoint .*bad\.pth does not exist',
            'truncated': r'checkpoint .*bad\.pth cannot be read, it may be damaged',
            'garbage': r'checkpoint .*bad\.pth cannot be read, it may be damaged',
            'no weights': r'checkpoint .*bad\.pth holds no weights',
            'of another network': r'checkpoint .*bad\.pth is not for model\.backbone: .* has none',
            'with code': r'checkpoint .*bad\.pth is refused: it holds \w+\.system',
        }
        return str(file), messages[kind]

    return damaged


UNREADABLE = ['missing', 'truncated', 'garbage', 'no weights', 'with code']


@pytest.mark.parametrize('kind', UNREADABLE)
def test_unreadable(write, kind, tmp_path):
    file, message = write(kind)
    with pytest.raises(ValueError, match=f'^{message}') as caught:
        read_checkpoint(file)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'it-ran').exists()


def test_url_is_fetched_once(tmp_path, monkeypatch):
    """By torch hub, which keeps it: the second time there is nothing to fetch it from."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    source = tmp_path / 'source.pth'
    torch.save(ACmixResNet(26, base_channels=16).state_dict(), source)
    fetched = []

    def fetch(url, file, *args, **kwargs):
        fetched.append(url)
        source.rename(file)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fetch)
    # It waits for the other processes of a job, which do not check.
    monkeypatch.setitem(CheckpointLoader._schemes, 'http://', None)
    for _ in range(2):
        check_starts(config(init_cfg=pretrained(NOWHERE)))
    assert fetched == [NOWHERE]


def config(**backbone) -> Config:
    return Config({'model': {'type': 'FCOS', 'backbone': {**RESNET, **backbone}}})


def pretrained(file: str, **more) -> dict:
    return {'type': 'Pretrained', 'checkpoint': file, **more}


def test_local_files_take_precedence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'there.pth').touch()
    url, other = 'https://example.org/v1/there.pth', 'https://example.org/v1/elsewhere.pth'
    cfg = config(init_cfg=[{'type': 'Kaiming', 'layer': 'Conv2d'}, pretrained(url)])
    cfg.model.neck = {'type': 'FPN', 'init_cfg': pretrained(other)}
    cfg.model.pretrained = url
    cfg.model.heads = [{'type': 'Head', 'init_cfg': pretrained('kept/there.pth', prefix='a.')}]
    cfg.load_from = url
    resolve_weights(cfg)
    assert cfg.model.backbone.init_cfg[1] == pretrained('checkpoints/there.pth')
    assert cfg.model.neck.init_cfg == pretrained(other)
    assert cfg.model.pretrained == cfg.load_from == 'checkpoints/there.pth'
    assert cfg.model.heads[0].init_cfg == pretrained('kept/there.pth', prefix='a.')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert f'model.backbone starts from checkpoints/there.pth, in the place of {url}' in lines


def test_a_start_that_serves(tmp_path, capsys):
    file = str(tmp_path / 'x.pth')
    state = ACmixResNet(26, base_channels=16).state_dict()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in state.items()}}, file)
    check_starts(config(init_cfg=pretrained(file, prefix='backbone.')))
    check_starts(config())
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ('name', 'backbone', 'message'),
    [
        (
            'acmix-r26_in1k.pth', {'frozen_stages': 1, 'norm_eval': True},
            'configs/imagenet/acmix-r26_*_in1k.py (nobody has published it); to go on without it, '
            'with more epochs: --cfg-options model.backbone.init_cfg=None '
            'model.backbone.frozen_stages=-1 model.backbone.norm_eval=False',
        ),
        (
            'swin_tiny_patch4_window7_224.pth', {'warm_start': True},
            'SwinTransformer/storage/releases/tag/v1.0.0; to go on without it, with more epochs: '
            '--cfg-options model.backbone.init_cfg=None model.backbone.warm_start=False',
        ),
        ('acmix_swin_small_patch4_window7_224.pth', {}, 'https://github.com/LeapLabTHU/ACmix'),
        ('san19_patchwise.pth', {}, 'model_best.pth in the folder of that network'),
        ('i_dynamic_dwnet_tiny_224.pth', {}, 'DemystifyLocalViT'),
        ('mine.pth', {}, 'starts from it; to go on without it'),
    ],
)  # fmt: skip
def test_missing_file(name, backbone, message):
    with pytest.raises(ValueError, match=r'^checkpoint') as caught:
        check_starts(config(init_cfg=pretrained(f'checkpoints/{name}'), **backbone))
    text = str(caught.value)
    assert text.startswith(f'checkpoint checkpoints/{name} does not exist, and model.backb')
    assert message in text
    assert '\n' not in text


def test_url_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(
        ValueError, match=r'cannot be fetched .* a file checkpoints/weights\.pth is'
    ):
        check_starts(config(init_cfg=pretrained(NOWHERE)))


def test_damaged_in_the_cache(tmp_path, monkeypatch):
    """The message names the file to remove."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = tmp_path / 'hub' / 'checkpoints' / 'weights.pth'
    file.parent.mkdir(parents=True)
    file.write_text('a page that says sorry')
    with pytest.raises(ValueError, match=f'^checkpoint {file} cannot be read'):
        check_starts(config(init_cfg=pretrained(NOWHERE)))


@pytest.mark.parametrize('backbone', ['SwinTransformer', 'PyramidVisionTransformer', 'ResNet'])
def test_of_another_network(backbone, tmp_path):
    """Whatever mmdet's own classes raise, and where they would go on without a word."""
    torch.save({'model': {'layer9.weight': torch.ones(1)}}, tmp_path / 'x.pth')
    cfg = Config({'model': {'backbone': {'type': backbone}}})
    cfg.model.backbone.update({'depth': 18} if backbone == 'ResNet' else {'convert_weights': True})
    cfg.model.backbone.init_cfg = pretrained(str(tmp_path / 'x.pth'))
    with pytest.raises(ValueError, match=r'^checkpoint .*x\.pth is not for model\.backbone: '):
        check_starts(cfg)


def test_of_a_deeper_network(tmp_path):
    state = ACmixSwinTransformer(**{**SWIN, 'depths': (1, 1, 2, 1)}).state_dict()
    torch.save({f'backbone.{k}': v for k, v in state.items()}, tmp_path / 'x.pth')
    cfg = config()
    cfg.model.backbone = {'type': 'ACmixSwinTransformer', **SWIN}
    cfg.model.backbone.init_cfg = pretrained(str(tmp_path / 'x.pth'))
    with pytest.raises(
        ValueError, match=r'does not fit ACmixSwinTransformer \(KeyError: '
    ) as caught:
        check_starts(cfg)
    assert '\n' not in str(caught.value)


@pytest.fixture
def recipe(tmp_path, monkeypatch, pytestconfig):
    """Writes a config that starts from a checkpoint."""
    monkeypatch.chdir(pytestconfig.rootpath)

    def write(file: str, key: str) -> str:
        start = f"load_from = '{file}'"
        if key == 'init_cfg':
            start = f"model = dict(backbone=dict(init_cfg=dict(checkpoint='{file}')))"
            start = start.replace('checkpoint=', "_delete_=True, type='Pretrained', checkpoint=")
        (tmp_path / 'recipe.py').write_text(f"_base_ = '{CONFIG.resolve()}'\n{start}\n")
        return str(tmp_path / 'recipe.py')

    return write


@pytest.mark.parametrize('key', ['init_cfg', 'load_from'])
@pytest.mark.parametrize('kind', UNREADABLE)
def test_training_does_not_begin(write, recipe, key, kind, tmp_path):
    file, message = write(kind)
    with pytest.raises(SystemExit, match=f'^error: {message}'):
        train.main([recipe(file, key), '--work-dir', str(tmp_path / 'work')])
    assert not (tmp_path / 'work').exists()
    assert not (tmp_path / 'it-ran').exists()


def test_nothing_begins_from_another_network(write, recipe, tmp_path, monkeypatch, digits_options):
    file, message = write('of another network')
    arguments = [recipe(file, 'init_cfg'), '--work-dir', str(tmp_path / 'work')]
    arguments += ['--cfg-options', *digits_options]
    monkeypatch.setattr('acmix_mm.analysis.comparison.train_all', None)
    for program in (train, compare):
        with pytest.raises(SystemExit, match=f'^error: {message}'):
            program.main(arguments)


def test_only_training_needs_the_file(recipe, tmp_path):
    """Programs that read a trained checkpoint build the model alone."""
    args = argparse.Namespace(
        config=recipe('none.pth', 'init_cfg'),
        checkpoint=str(tmp_path / 'trained.pth'),
        device='cpu',
    )
    cfg = load_config(args.config)
    init_default_scope('mmdet')
    torch.save({'state_dict': MODELS.build(cfg.model).state_dict()}, args.checkpoint)
    checkpoint = load_checkpoint(args.checkpoint)
    build_model(cfg, checkpoint, args)
    predict.build_inferencer(cfg, checkpoint, args)
    with pytest.raises(ValueError, match=r'none\.pth does not exist'):
        check_starts(cfg)


def small() -> torch.nn.Module:
    """A model around a mixed backbone."""
    backbone = ACmixResNet(26, base_channels=16).eval()
    return torch.nn.ModuleDict({'backbone': backbone, 'head': torch.nn.Linear(3, 2)})


def check(model: torch.nn.Module, weights: dict) -> str:
    """The message of programs for a state dict that is not the model's."""
    args = argparse.Namespace(config='c.py', checkpoint='x.pth')
    with pytest.raises(SystemExit) as caught:
        check_weights(model, {'state_dict': weights}, args)
    assert caught.value.code.startswith('error: checkpoint x.pth does not fit config c.py: ')
    assert '\n' not in caught.value.code
    return caught.value.code.partition('c.py: ')[2]


@pytest.mark.parametrize('form', [lambda state: state, parallel])
def test_all_weights_of_a_model(form):
    """In parallel or not, with what its loading leaves out, without counters of batches."""
    source, target = small(), small()
    weights = form(source.state_dict() | {'backbone.layer1.0.conv2.conv_p.bias': torch.ones(1)})
    weights = {n: v for n, v in weights.items() if not n.endswith('num_batches_tracked')}
    assert misfit(target, {'state_dict': weights}) is None
    for ours, theirs in zip(source.parameters(), target.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_does_not_fit():
    model = small()
    state = model.state_dict()
    total = len(state)
    half = dict(list(state.items())[: total // 2])
    message = check(model, half)
    counters = [n for n in state if n not in half and n.endswith('num_batches_tracked')]
    missing = total - len(half) - len(counters)
    assert message.startswith(f'{missing} of {total} weights are missing, such as ')
    message = check(model, {**state, 'head.weight': torch.ones(5, 3), 'head.bias': torch.ones(5)})
    assert message == (
        f'2 of {total} weights have another shape, such as head.weight: (5, 3) instead of (2, 3)'
    )
    message = check(model, {**state, 'mask_head.weight': torch.ones(1)})
    assert message == (
        f'1 of its {total + 1} weights are not in the model, such as mask_head.weight'
    )
    swin = ACmixSwinTransformer(**SWIN).state_dict()
    message = check(model, {f'backbone.{name}': value for name, value in swin.items()})
    assert 'are missing' in message
    assert f'{len(swin)} of its {len(swin)} weights are not in the model' in message


def test_the_other_form():
    """Which one it is, and where the config of it is or how to make it."""
    trained, deployed = small(), deploy(small())
    assert check(trained, deployed.state_dict()).startswith('it is of the form for inference')
    assert check(deployed, trained.state_dict()).startswith('it is of the model as it is trained')
    assert misfit(deployed, deploy(small()).state_dict()) is None


def test_other_kernels():
    """Learned ones where the config says that they are constant, and the reverse."""
    learned, constant = (
        torch.nn.ModuleDict({'backbone': ACmixResNet(26, base_channels=16, shift=shift)})
        for shift in ('learned', 'fixed')
    )
    for model, other, sort, name in (
        (learned, constant, 'constant', 'shift_kernel'),
        (constant, learned, 'learned', 'dep_conv.weight'),
    ):
        message = check(model, other.state_dict())
        assert message.startswith(f'state dict has {sort} kernels, with ')
        assert f'backbone.layer1.0.conv2.{name}' in message


def whole(model: torch.nn.Module) -> dict:
    """A checkpoint to go on from, as far as it is looked at."""
    meta = {'epoch': 1, 'iter': 3}
    return {'state_dict': model.state_dict(), 'meta': meta, 'message_hub': {}, 'optimizer': {}}


def started(checkpoint: dict, file: Path, **settings) -> None:
    torch.save(checkpoint, file)
    cfg = Config({'model': RESNET, 'load_from': str(file), **settings})
    check_starts(cfg)


def test_going_on_needs_all_weights_and_the_state(tmp_path):
    file, model = tmp_path / 'x.pth', ACmixResNet(26, base_channels=16)
    started(whole(model), file, resume=True)
    half = dict(list(model.state_dict().items())[::2])
    with pytest.raises(ValueError, match=r'is not for resuming: \d+ of \d+ weights are missing'):
        started({**whole(model), 'state_dict': half}, file, resume=True)
    weights = {key: whole(model)[key] for key in ('state_dict', 'meta')}
    with pytest.raises(ValueError, match=r'no state of a training \(message_hub, optimizer\)'):
        started(weights, file, resume=True)
    for meta in (None, [1], {'epoch': '1', 'iter': None}):
        with pytest.raises(ValueError, match=r'\(meta\.epoch, meta\.iter\)'):
            started({**whole(model), 'meta': meta}, file, resume=True)


def test_how_much_of_a_model_a_start_has(tmp_path, capsys):
    """In one line; nothing at all is refused."""
    file, model = tmp_path / 'x.pth', ACmixResNet(26, base_channels=16)
    started(model.state_dict(), file)
    assert not capsys.readouterr().out
    names = [n for n in model.state_dict() if not n.endswith('num_batches_tracked')]
    weights = dict(model.state_dict(), **{names[0]: torch.ones(7)})
    del weights[names[1]]
    started(weights, file)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f'load_from starts with {len(names) - 2} of {len(names)} weights from {file}; others, '
        f'such as {names[0]}, keep'
    )
    with pytest.raises(ValueError, match='it has none of the weights of ACmixResNet'):
        started({'other': torch.ones(1)}, file)


class CfgNode(dict):
    """Stands for yacs', where a file is written."""


CfgNode.__module__ = 'yacs.config'


@pytest.mark.parametrize('many', [False, True])
@pytest.mark.parametrize('family', ['Swin', 'PyramidVision'])
def test_releases_for_the_plain_networks(family, many, tmp_path, monkeypatch):
    """mmdet's own classes, of whose names the converters cannot take off ``module.``."""
    plain = {
        'Swin': {'type': 'SwinTransformer', **SWIN},
        'PyramidVision': {'type': 'PyramidVisionTransformer', 'embed_dims': 16,
                          'num_layers': [1, 1, 1, 1], 'num_heads': [1, 2, 2, 4]},
    }[family]  # fmt: skip
    init_default_scope('mmdet')
    source = MODELS.build(plain)
    weights = {'Swin': releases.swin, 'PyramidVision': releases.pvt}[family](source.state_dict())
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        torch.save(
            {'model': parallel(weights) if many else weights, 'config': CfgNode(A=CfgNode(B=1))},
            tmp_path / 'x.pth',
        )
    backbone = {**plain, 'convert_weights': True, 'init_cfg': pretrained(str(tmp_path / 'x.pth'))}
    check_starts(Config({'model': {'backbone': backbone}}))
    target = MODELS.build(ConfigDict(backbone))
    target.init_weights()
    for name, value in target.state_dict().items():
        if not re.match(r'norm\d', name):  # the release has the classifier's
            assert torch.equal(value, source.state_dict()[name]), name


def test_every_start_has_a_source(pytestconfig, monkeypatch):
    """Of the files that recipes name; for those trained here, the config that does it exists."""
    monkeypatch.chdir(pytestconfig.rootpath)
    names = set()
    for file in Path('configs/_base_/backbones').glob('*.py'):
        init_cfg = Config.fromfile(file).backbone.get('init_cfg') or {}
        names.add(init_cfg.get('checkpoint', '').rsplit('/', 1)[-1])
    names.discard('')
    assert len(names) > 10
    for name in names:
        with pytest.raises(ValueError, match='it comes from') as caught:
            check_starts(config(init_cfg=pretrained(f'nowhere/{name}')))
        if name.endswith('_in1k.pth'):
            (pattern,) = re.findall(r'configs/imagenet/\S+', str(caught.value))
            assert list(Path().glob(pattern)), name


def test_classes_of_a_checkpoint(capsys):
    """The same in another order are refused; others are said."""
    dataset = {'type': 'CocoDataset', 'metainfo': {'classes': ('cat', 'dog')}}
    cfg = Config({'test_dataloader': {'dataset': dataset}, 'default_scope': 'mmdet'})

    def check(*classes):
        check_classes(cfg, 'test', {'meta': {'dataset_meta': {'classes': classes}}}, 'x.pth')
        return capsys.readouterr().out

    check('cat', 'dog')  # imports mmdet, which says something
    assert check('cat', 'dog') == ''
    assert check('cat', 'owl') == (
        'warning: checkpoint x.pth is of other classes than test_dataloader.dataset: '
        "('cat', 'owl')\n"
    )
    assert "('cat', 'dog', 'owl')" in check('cat', 'dog', 'owl')
    with pytest.raises(ValueError, match=r"x\.pth is of .* another order: class 0 is 'dog' there"):
        check('dog', 'cat')
    for checkpoint in ({}, {'meta': None}, {'meta': {'dataset_meta': {}}}):
        check_classes(cfg, 'test', checkpoint, 'x.pth')
    assert capsys.readouterr().out == ''
