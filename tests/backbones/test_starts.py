"""From a checkpoint: however it is wrapped, every weight; plain networks' by their own names."""

from collections.abc import Callable

import pytest
import releases
import torch
from mmdet.models.backbones import PyramidVisionTransformer, SwinTransformer
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from releases import parallel
from torch import nn

from acmix_mm import backbones
from acmix_mm.backbones import SAN, ACmixSAN
from acmix_mm.layers import MixedOperator

SMALL = {
    'ACmixResNet': {'depth': 26, 'base_channels': 16},
    'SAN': {'depth': 10, 'base_channels': 32},
    'ACmixSAN': {'depth': 10, 'base_channels': 32},
    'ACmixPyramidVisionTransformer': {
        'embed_dims': 16, 'num_layers': [1, 1, 1, 1], 'num_heads': [1, 2, 2, 4],
        'pretrain_img_size': 64, 'convert_weights': False,
    },
    'ACmixSwinTransformer': {'embed_dims': 24, 'depths': (2, 1, 1, 1), 'num_heads': (1, 2, 4, 8)},
    'XVolutionResNet': {'depth': 18, 'base_channels': 16},
    'DWNet': {'arch': {'embed_dims': 32, 'depths': (1, 1, 1, 1)}},
}  # fmt: skip
every_backbone = pytest.mark.parametrize('name', SMALL)


def build(name: str, file: object = None, **more) -> nn.Module:
    init_cfg = ConfigDict(type='Pretrained', checkpoint=str(file)) if file else None
    return getattr(backbones, name)(init_cfg=init_cfg, **{**SMALL[name], **more})


def random_state(model: nn.Module) -> dict:
    for value in model.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5)
    return model.state_dict()


def assert_loaded(model: nn.Module, state: dict) -> None:
    loaded = model.state_dict()
    assert not [name for name in state if not torch.equal(loaded[name], state[name])]


HEAD = {'head.fc.weight': torch.ones(3, 4), 'head.fc.bias': torch.ones(3)}
FORMS: dict[str, tuple[Callable[[dict], dict], str | None]] = {
    'bare': (lambda state: state, None),
    'module': (lambda state: {'state_dict': parallel(state), 'epoch': 3}, None),
    'model': (lambda state: {'model': state}, None),
    'mmpretrain': (
        lambda state: {'state_dict': {f'backbone.{n}': v for n, v in state.items()} | HEAD},
        'backbone.',
    ),
    'mmpretrain without prefix': (
        lambda state: {'state_dict': {f'backbone.{n}': v for n, v in state.items()} | HEAD},
        None,
    ),
    'another prefix': (
        lambda state: {'state_dict': parallel({f'teacher.net.{n}': v for n, v in state.items()})},
        'teacher.net.',
    ),
}


@every_backbone
@pytest.mark.parametrize('form', FORMS)
def test_every_weight_is_loaded(name, form, tmp_path):
    wrap, prefix = FORMS[form]
    state = random_state(build(name))
    torch.save(wrap(state), tmp_path / 'x.pth')
    model = build(name, tmp_path / 'x.pth')
    if prefix:
        model.init_cfg.prefix = prefix
    init_cfg = model.init_cfg.copy()
    model.init_weights()
    assert_loaded(model, state)
    assert model.init_cfg == init_cfg


# Of mmdet's classes, Swin and PVT take one initialisation only.
@pytest.mark.parametrize('name', ['ACmixResNet', 'SAN', 'ACmixSAN', 'XVolutionResNet'])
def test_among_other_initialisations(name, tmp_path):
    """A list of them, which mmengine's classes take."""
    state = random_state(build(name))
    del state['bn_in.weight' if 'bn_in.weight' in state else 'bn1.weight']
    torch.save(state, tmp_path / 'x.pth')
    model = build(name, tmp_path / 'x.pth')
    constant = ConfigDict(type='Constant', val=3.0, bias=4.0, layer='BatchNorm2d')
    model.init_cfg = [constant, model.init_cfg]
    model.init_weights()
    assert_loaded(model, state)
    assert (model.bn_in if name.endswith('SAN') else model.norm1).weight.unique() == 3


@every_backbone
@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_nothing_of_the_network(name, prefix, tmp_path):
    torch.save({'state_dict': {'layer9.weight': torch.ones(1)}}, tmp_path / 'x.pth')
    model = build(name, tmp_path / 'x.pth')
    if prefix:
        model.init_cfg.prefix = prefix
    with pytest.raises(
        ValueError, match=rf'x\.pth (has none of the weights of|does not fit) {name}'
    ):
        model.init_weights()


@every_backbone
def test_what_is_missing_is_logged(name, tmp_path, monkeypatch):
    state = random_state(build(name))
    missing = list(state)[3]
    del state[missing]
    torch.save(state, tmp_path / 'x.pth')
    logged = []
    monkeypatch.setattr(MMLogger.get_current_instance(), 'info', logged.append)
    build(name, tmp_path / 'x.pth').init_weights()
    assert [m for m in logged if m.startswith('1 of ') and m.endswith(f'values: {missing}')]


@pytest.mark.parametrize('many', [False, True])
@pytest.mark.parametrize('prefix', [None, 'net.'])
@pytest.mark.parametrize('family', ['Swin', 'PyramidVision'])
def test_warm_start_of_a_transformer_is_the_plain_network(family, prefix, many, tmp_path):
    """From the release of the plain network, of a training on several GPUs or not."""
    name = f'ACmix{family}Transformer'
    plain_class, rename = {
        'Swin': (SwinTransformer, releases.swin),
        'PyramidVision': (PyramidVisionTransformer, releases.pvt),
    }[family]
    plain = plain_class(**SMALL[name])
    for value in plain.parameters():
        nn.init.normal_(value, std=0.2)
    plain.eval()
    state = rename(plain.state_dict())
    state = {f'{prefix or ""}{n}': value for n, value in state.items()}
    torch.save({'model': parallel(state) if many else state}, tmp_path / 'x.pth')
    model = build(name, tmp_path / 'x.pth', warm_start=True, convert_weights=True)
    if prefix:
        model.init_cfg.prefix = prefix
    model.init_weights()
    model.eval()
    x = torch.randn(1, 3, 256, 256)
    norms = {n: v for n, v in plain.state_dict().items() if n.startswith('norm')}
    model.load_state_dict(norms, strict=False)  # Swin's classifier has but the last of them
    for ours, theirs in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    rates = [
        (m.rate1.item(), m.rate2.item()) for m in model.modules() if isinstance(m, MixedOperator)
    ]
    assert set(rates) == {(1, 0)}


def test_release_of_dwnet_from_several_gpus(tmp_path):
    """All that its classifier shares with the backbone, in parallel or not."""
    state = random_state(build('DWNet'))
    release = releases.swin(state)
    for weights in (release, parallel(release)):
        torch.save({'model': weights}, tmp_path / 'x.pth')
        model = build('DWNet', tmp_path / 'x.pth', convert_weights=True)
        model.init_weights()
        assert_loaded(model, {n: v for n, v in state.items() if not n.startswith('norm')})


@pytest.mark.parametrize('form', ['release', 'own'])
def test_warm_start_of_san_is_the_plain_network(form, tmp_path):
    """From the release's model_best.pth, and from a checkpoint of ImageNet training here."""
    plain = SAN(10, base_channels=32)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    plain.eval()
    state = plain.state_dict()
    if form == 'release':
        classifier = {'fc.weight': torch.ones(3, 1024), 'fc.bias': torch.ones(3)}
        checkpoint = {'epoch': 100, 'state_dict': parallel({**state, **classifier})}
    else:
        checkpoint = {'state_dict': {f'backbone.{n}': v for n, v in state.items()} | HEAD}
    torch.save(checkpoint, tmp_path / 'x.pth')
    model = build('ACmixSAN', tmp_path / 'x.pth', warm_start=True)
    model.init_weights()
    model.eval()
    x = torch.randn(1, 3, 48, 40)
    for ours, theirs in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    model(x)[-1].square().mean().backward()
    for layer in model.modules():
        if isinstance(layer, MixedOperator):
            assert (layer.rate1.item(), layer.rate2.item()) == (1, 0)
            assert layer.rate2.grad is not None


def test_warm_start_of_san_refuses(tmp_path):
    torch.save(build('ACmixSAN').state_dict(), tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'warm_start must be False for .* mixed .*\.rate1'):
        build('ACmixSAN', tmp_path / 'x.pth', warm_start=True).init_weights()
    with pytest.raises(ValueError, match='warm_start must be False without init_cfg'):
        build('ACmixSAN', warm_start=True).init_weights()
    for arguments in ({'mix': 'sum'}, {'deploy': True}):
        with pytest.raises(ValueError, match='warm_start must be False unless mix'):
            ACmixSAN(10, base_channels=32, warm_start=True, **arguments)
