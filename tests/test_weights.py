"""Checkpoints and models: what fits; those from which models start, found or refused."""

import argparse
import re
from pathlib import Path

import compare
import hostile
import predict
import pytest
import torch
import train
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader

from acmix_mm.backbones import ACmixResNet, ACmixSwinTransformer
from acmix_mm.checkpoints import read_checkpoint
from acmix_mm.command_line import build_model, load_checkpoint, load_config
from acmix_mm.weights import check_starts, resolve_weights

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
    with pytest.raises(SystemExit) as caught:
        check_starts(config(init_cfg=pretrained(f'checkpoints/{name}'), **backbone))
    text = caught.value.code
    assert text.startswith(f'error: checkpoint checkpoints/{name} does not exist, and model.backb')
    assert message in text
    assert '\n' not in text


def test_url_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with pytest.raises(
        SystemExit, match=r'cannot be fetched .* a file checkpoints/weights\.pth is'
    ):
        check_starts(config(init_cfg=pretrained(NOWHERE)))


def test_damaged_in_the_cache(tmp_path, monkeypatch):
    """The message names the file to remove."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    file = tmp_path / 'hub' / 'checkpoints' / 'weights.pth'
    file.parent.mkdir(parents=True)
    file.write_text('a page that says sorry')
    with pytest.raises(SystemExit, match=f'error: checkpoint {file} cannot be read'):
        check_starts(config(init_cfg=pretrained(NOWHERE)))


@pytest.mark.parametrize('backbone', ['SwinTransformer', 'PyramidVisionTransformer', 'ResNet'])
def test_of_another_network(backbone, tmp_path):
    """Whatever mmdet's own classes raise, and where they would go on without a word."""
    torch.save({'model': {'layer9.weight': torch.ones(1)}}, tmp_path / 'x.pth')
    cfg = Config({'model': {'backbone': {'type': backbone}}})
    cfg.model.backbone.update({'depth': 18} if backbone == 'ResNet' else {'convert_weights': True})
    cfg.model.backbone.init_cfg = pretrained(str(tmp_path / 'x.pth'))
    with pytest.raises(
        SystemExit, match=r'error: checkpoint .*x\.pth is not for model\.backbone: '
    ):
        check_starts(cfg)


def test_of_a_deeper_network(tmp_path):
    state = ACmixSwinTransformer(**{**SWIN, 'depths': (1, 1, 2, 1)}).state_dict()
    torch.save({f'backbone.{k}': v for k, v in state.items()}, tmp_path / 'x.pth')
    cfg = config()
    cfg.model.backbone = {'type': 'ACmixSwinTransformer', **SWIN}
    cfg.model.backbone.init_cfg = pretrained(str(tmp_path / 'x.pth'))
    with pytest.raises(
        SystemExit, match=r'does not fit ACmixSwinTransformer \(KeyError: '
    ) as caught:
        check_starts(cfg)
    assert '\n' not in caught.value.code


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
    monkeypatch.setattr(compare, 'train_all', None)
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
    with pytest.raises(SystemExit, match=r'none\.pth does not exist'):
        check_starts(cfg)


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
        with pytest.raises(SystemExit, match='it comes from') as caught:
            check_starts(config(init_cfg=pretrained(f'nowhere/{name}')))
        if name.endswith('_in1k.pth'):
            (pattern,) = re.findall(r'configs/imagenet/\S+', caught.value.code)
            assert list(Path().glob(pattern)), name
