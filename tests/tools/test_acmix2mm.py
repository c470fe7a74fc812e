"""Checkpoints of the authors' release to ours and back, exactly; refusals by name."""

import acmix2mm
import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from acmix_mm.backbones import ACmixResNet, ACmixSwinTransformer
from acmix_mm.checkpoints import state_dict_of
from acmix_mm.layers import ACmix

WRAPPINGS = {
    'bare': lambda state: state,
    'model': lambda state: {'model': state, 'epoch': 299},
    'state_dict': lambda state: {'state_dict': state, 'optimizer': {'state': {}}},
    'module': lambda state: {'state_dict': {f'module.{k}': v for k, v in state.items()}},
}
INDEX = 'relative_position_index'


@pytest.fixture
def swin(golden):
    """The release's state dict, and its other tensors; it registers the index as a buffer."""
    tensors = golden('acmix_swin_embed24')
    state = {
        name.removeprefix('state/'): value.float()
        for name, value in tensors.items()
        if name.startswith('state/')
    }
    for name in [n for n in state if n.endswith('_bias_table')]:
        state[name.replace('relative_position_bias_table', INDEX)] = release_index(7)
    return state, tensors


def release_index(window: int) -> torch.Tensor:
    """By its meaning: the row of the table for the offset between two pixels of a window."""
    pixels = [(i, j) for i in range(window) for j in range(window)]
    rows = [
        [(a - c + window - 1) * (2 * window - 1) + b - d + window - 1 for c, d in pixels]
        for a, b in pixels
    ]
    return torch.tensor(rows)


@pytest.fixture
def resnet():
    """A state dict of the release's names: torchvision's, with conv_p.bias and a classifier."""
    model = ACmixResNet(26, base_channels=16)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.constant_(module.num_batches_tracked, 7)
    state = {**model.state_dict(), 'fc.weight': torch.randn(9, 512), 'fc.bias': torch.randn(9)}
    for name, layer in model.named_modules():
        if isinstance(layer, ACmix):
            state[f'{name}.conv_p.bias'] = torch.zeros(layer.head_dim)
    return state


@pytest.fixture(params=['swin', 'resnet'])
def release(request):
    state = request.getfixturevalue(request.param)
    return state[0] if request.param == 'swin' else state


def convert(state: dict, tmp_path, name: str = 'out', *options: str) -> dict:
    torch.save(state, tmp_path / f'{name}-in.pth')
    acmix2mm.main([str(tmp_path / f'{name}-in.pth'), str(tmp_path / f'{name}.pth'), *options])
    return torch.load(tmp_path / f'{name}.pth', weights_only=True)


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize('wrapping', WRAPPINGS)
def test_round_trip(release, wrapping, tmp_path):
    own = convert(WRAPPINGS[wrapping](release), tmp_path)
    assert own.keys() == {'meta', 'state_dict'}
    back = convert(own, tmp_path, 'back', '--reverse')
    if 'fc.weight' in release:
        assert all(name.startswith('module.') for name in back['state_dict'])
    else:
        assert back.keys() == {'model'}
    assert_same(state_dict_of(back), release)
    assert_same(convert(back, tmp_path, 'again')['state_dict'], own['state_dict'])


def own_backbone(state: dict) -> dict:
    prefix = 'backbone.'
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def test_swin_computes_what_the_release_does(swin, tmp_path):
    state, tensors = swin
    own = convert({'model': state}, tmp_path)['state_dict']
    model = ACmixSwinTransformer(
        embed_dims=24, depths=(2, 2, 2, 2), num_heads=(3, 3, 6, 12), out_indices=(3,)
    ).double()
    model.load_state_dict(own_backbone(own))
    model.eval()
    with torch.no_grad():
        (out,) = model(tensors['input'])
    torch.testing.assert_close(out, tensors['output/4'], rtol=1e-5, atol=1e-5)
    assert torch.equal(own['head.fc.weight'], state['head.weight'])


@pytest.mark.parametrize('convert_weights', [True, False])
def test_swin_starts_from_the_release_and_from_its_conversion(swin, convert_weights, tmp_path):
    convert({'model': swin[0]}, tmp_path)
    file = tmp_path / ('out-in.pth' if convert_weights else 'out.pth')
    model = ACmixSwinTransformer(
        embed_dims=24, depths=(2, 2, 2, 2), num_heads=(3, 3, 6, 12), out_indices=(3,),
        convert_weights=convert_weights,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=str(file)),
    ).double()  # fmt: skip
    if not convert_weights:
        model.init_cfg.prefix = 'backbone.'
    model.init_weights()
    own = own_backbone(torch.load(tmp_path / 'out.pth')['state_dict'])
    loaded = model.state_dict()
    different = {name for name in own if not torch.equal(loaded[name], own[name])}
    # Those of detection have a norm for every stage, and mmdet does not take the classifier's.
    assert different == ({'norm3.weight'} | {'norm3.bias'} if convert_weights else set())


def test_swin_without_what_follows_from_the_architecture(swin, tmp_path):
    state = swin[0]
    bare = {n: v for n, v in state.items() if not n.endswith((INDEX, 'attn_mask'))}
    own = convert(bare, tmp_path)
    assert_same(convert(own, tmp_path, 'back', '--reverse')['model'], state)


def test_resnet_loads_and_names_what_is_dropped(resnet, tmp_path, capsys):
    own = convert(resnet, tmp_path)['state_dict']
    text = capsys.readouterr().out
    assert 'dropped:     8 conv_p.bias' in text
    assert 'ACmixResNet(depth=26, base_channels=16)' in text
    assert 'classifier:  9 classes' in text
    ACmixResNet(26, base_channels=16).load_state_dict(own_backbone(own))


def test_without_a_classifier(release, tmp_path, capsys):
    state = {n: v for n, v in release.items() if not n.startswith(('fc.', 'head.'))}
    own = convert(state, tmp_path)
    assert 'classifier:  none' in capsys.readouterr().out
    assert_same(state_dict_of(convert(own, tmp_path, 'back', '--reverse')), state)


def spoiled(state: dict, how: str) -> dict:
    """A state dict, of the release or ours, with something wrong."""
    names = list(state)
    if how == 'half':
        return {name: state[name] for name in names[: len(names) // 2]}
    if how == 'every other':
        return {name: state[name] for name in names[::2]}
    if how == 'without a weight':
        victims = ('s.1.blocks.1.norm2.weight', 'layer3.2.bn2.weight')
        return {name: value for name, value in state.items() if not name.endswith(victims)}
    if how == 'of another shape':
        victims = ('mlp.fc2.weight', 'ffn.layers.1.weight', 'bn2.weight')
        return {n: v[:1] if n.endswith(victims) else v for n, v in state.items()}
    new = {
        'unknown': {'backbone.extra' if 'backbone.norm1' in names else 'extra': torch.ones(1)},
        'dep_conv.bias': {
            name.replace('weight', 'bias'): value[:, 0, 0, 0]
            for name, value in state.items()
            if name.endswith('dep_conv.weight')
        },
    }
    return {**state, **new[how]}


@pytest.mark.parametrize('options', [[], ['--reverse']])
@pytest.mark.parametrize(
    ('how', 'message'),
    [
        ('half', 'missing|is no ResNet-ACmix: its stages must have .* blocks'),
        ('every other', 'missing|of no known kind'),
        ('without a weight', r': 1 missing \(backbone\.\S*\.(norm2|bn2)\.weight\)$'),
        ('unknown', r': 1 not known \((backbone\.)?extra\)$'),
        ('dep_conv.bias', r': 8 not known \(backbone\..*dep_conv\.bias'),
        ('of another shape', r': 8 of another shape \(backbone\.'),
    ],
)
def test_refuses_what_it_cannot_explain(release, how, message, options, tmp_path):
    state = convert(release, tmp_path, 'own')['state_dict'] if options else release
    with pytest.raises(SystemExit, match=rf'^error: .*bad-in\.pth .*({message})') as caught:
        convert(spoiled(state, how), tmp_path, 'bad', *options)
    assert '\n' not in caught.value.code
    assert not (tmp_path / 'bad.pth').exists()


def test_refuses_another_window(swin, tmp_path):
    state = {n: v.flip(0) if n.endswith(INDEX) else v for n, v in swin[0].items()}
    with pytest.raises(SystemExit, match=f'{INDEX} is not that of its window'):
        convert(state, tmp_path)


def test_refuses_other_forms(release, tmp_path):
    own = convert(release, tmp_path)
    with pytest.raises(SystemExit, match=r'of no known kind in the release.* of the other form'):
        convert(own, tmp_path, 'again')
    with pytest.raises(SystemExit, match=r'of no known kind in this project.* of the other form'):
        convert(release, tmp_path, 'back', '--reverse')
    with pytest.raises(SystemExit, match='of no known kind'):
        convert({'conv1.weight': torch.ones(1)}, tmp_path, 'plain')


def test_wrong_arguments(resnet, tmp_path):
    torch.save(resnet, tmp_path / 'in.pth')
    (tmp_path / 'there.pth').touch()
    file = str(tmp_path / 'in.pth')
    for arguments, message in (
        ([file, str(tmp_path / 'x.pt')], r'OUT must end in \.pth'),
        ([file, str(tmp_path / 'no' / 'x.pth')], 'no does not exist'),
        ([file, str(tmp_path / 'there.pth')], r'there\.pth exists already'),
        ([str(tmp_path / 'none.pth'), str(tmp_path / 'x.pth')], r'none\.pth does not exist'),
    ):
        with pytest.raises(SystemExit, match=message):
            acmix2mm.main(arguments)
