"""Deploy form and ONNX, from a checkpoint to files that give the same numbers."""

import errno
import os

import export_onnx
import pytest
import switch_to_deploy
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.backbones import SAN
from acmix_mm.layers import ACmix
from acmix_mm.layers.deployable import Deployable


@MODELS.register_module(force=True)
class OwnBackbone(torch.nn.Module):
    """Somebody's own, on four scales."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = torch.nn.Conv2d(3, 8, 3, 4, 1), ACmix(8, 8)

    def forward(self, x):
        x = self.layer(self.stem(x))
        return tuple(torch.nn.functional.max_pool2d(x, 2**i, ceil_mode=True) for i in range(4))


CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
CHANNELS = [32, 64, 128, 256]
NARROW = ['model.backbone.base_channels=8', f'model.neck.in_channels={CHANNELS}']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A model with random statistics, and its checkpoint."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.base_channels = 8
    cfg.model.neck.in_channels = CHANNELS
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    file = tmp_path_factory.mktemp('trained') / 'trained.pth'
    state = {'meta': {'epoch': 4}, 'state_dict': model.state_dict(), 'optimizer': {}}
    torch.save(state, file)
    return model.eval(), file


@pytest.fixture(scope='module')
def deployed(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp('deployed') / 'deployed.pth'
    switch_to_deploy.main([CONFIG, str(trained[1]), str(out), '--cfg-options', *NARROW])
    return out


@torch.no_grad()
def test_deployed_checkpoint_and_config(trained, deployed):
    checkpoint = torch.load(deployed)
    assert checkpoint.keys() == {'meta', 'state_dict'}
    assert checkpoint['meta'] == {'epoch': 4}
    assert not any(
        'running_mean' in name for name in checkpoint['state_dict'] if 'backbone' in name
    )
    model = MODELS.build(Config.fromfile(deployed.with_suffix('.py')).model)
    model.load_state_dict(checkpoint['state_dict'])
    model.eval()
    x = torch.randn(1, 3, 65, 100)
    for ours, theirs in zip(model.backbone(x), trained[0].backbone(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def build(config, options, file):
    """A model in evaluation mode, and its checkpoint in a file."""
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model).eval()
    torch.save({'state_dict': model.state_dict()}, file)
    return model


def test_x_volution(tmp_path):
    """Its branches merge, and the config written builds the merged form."""
    config = 'configs/demo/retinanet_x-volution-r26_fpn_scene-digits.py'
    options = {'model.backbone.base_channels': 8, 'model.neck.in_channels': CHANNELS}
    model = build(config, options, tmp_path / 'trained.pth')
    files = [str(tmp_path / 'trained.pth'), str(tmp_path / 'deployed.pth')]
    switch_to_deploy.main([config, *files, '--cfg-options', *NARROW])
    state = torch.load(files[1])['state_dict']
    assert not any('norm' in name for name in state if 'backbone' in name)
    deployed = MODELS.build(Config.fromfile(tmp_path / 'deployed.py').model)
    deployed.load_state_dict(state)
    x = torch.randn(1, 3, 65, 100)
    torch.testing.assert_close(deployed.eval().backbone(x), model.backbone(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('acmix-pvt_fpn', {'num_layers': [1, 1, 1, 1]}),
        ('retinanet_acmix-swin-t_fpn', {'depths': [1, 1, 1, 1]}),
        ('retinanet_acmix-san10_fpn', {}),
    ],
)
def test_after_a_warm_start(name, options, tmp_path):
    """The config written builds what was trained, which no longer starts from the plain network."""
    config = f'configs/demo/{name}_scene-digits.py'
    options = {f'model.backbone.{k}': v for k, v in {**options, 'warm_start': True}.items()}
    model = build(config, options, tmp_path / 'trained.pth')
    files = [str(tmp_path / 'trained.pth'), str(tmp_path / 'deployed.pth')]
    switch_to_deploy.main(
        [config, *files, '--cfg-options', *(f'{k}={v}' for k, v in options.items())]
    )
    deployed = MODELS.build(Config.fromfile(tmp_path / 'deployed.py').model).eval()
    deployed.load_state_dict(torch.load(files[1])['state_dict'])
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(deployed.backbone(x), model.backbone(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


DCN = """
_base_ = 'acmix_mm::demo/retinanet_r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(
        _delete_=True, type='ResNet', depth=50, base_channels=8,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
        dcn=dict(type='ACmix', mix='complementary'), stage_with_dcn=(False, False, True, True),
    ),
    neck=dict(in_channels=[32, 64, 128, 256], conv_cfg=dict(type='XVolution')),
)
"""
PROPOSALS = """
_base_ = 'acmix_mm::demo/mask-rcnn_acmix-swin_fpn_scene-digits.py'
model = dict(
    backbone=dict(depths=[1, 1, 1, 1]),
    roi_head=dict(mask_head=dict(conv_cfg=dict(type='ACmix', attn_kernel_size=3))),
)
"""
SEGMENTOR = """
_base_ = 'mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py'
custom_imports = dict(imports=['acmix_mm'])
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    pretrained='open-mmlab://resnet50_v1c',
    backbone=dict(base_channels=8, stem_channels=16, conv_cfg=dict(type='ACmix')),
    decode_head=dict(
        in_channels=256, channels=16, conv_cfg=dict(type='ACmix'), norm_cfg=dict(type='BN')
    ),
    auxiliary_head=dict(in_channels=128, channels=16, norm_cfg=dict(type='BN')),
)
"""


@torch.no_grad()
@pytest.mark.parametrize(
    ('text', 'parts', 'operators'),
    [
        pytest.param(DCN, 'backbone, neck', 6 + 3 + 4, id='dcn and neck'),
        pytest.param(
            PROPOSALS, 'backbone, roi_head.mask_head', 4 + 2, id='backbone and head of regions'
        ),
        pytest.param(
            SEGMENTOR,
            'backbone, decode_head.convs, decode_head.conv_cat',
            16 + 2 + 3,
            id='backbone and head',
        ),
    ],
)
def test_operators_anywhere(text, parts, operators, tmp_path, capsys):
    """In backbones of others, necks and heads; the config written builds what is in the file."""
    config, files = tmp_path / 'config.py', [tmp_path / 'trained.pth', tmp_path / 'deployed.pth']
    config.write_text(text)
    model = build(config, {}, files[0])
    switch_to_deploy.main([str(config), *map(str, files)])
    assert f'an output of {parts}, relative: ' in capsys.readouterr().out
    cfg = Config.fromfile(tmp_path / 'deployed.py')
    assert 'torchvision' not in cfg.pretty_text
    assert 'open-mmlab' not in cfg.pretty_text
    deployed = MODELS.build(cfg.model).eval()
    deployed.load_state_dict(torch.load(files[1])['state_dict'])
    folded = [m for m in deployed.modules() if isinstance(m, Deployable)]
    assert len(folded) == operators
    assert all(m.deployed for m in folded)
    x = torch.randn(1, 3, 64, 96)
    for ours, theirs in zip(deployed.extract_feat(x), model.extract_feat(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())
    with pytest.raises(SystemExit, match='is deployed already'):
        switch_to_deploy.main(
            [str(tmp_path / name) for name in ('deployed.py', 'deployed.pth', 'x.pth')]
        )


def test_nothing_to_fold(tmp_path):
    (tmp_path / 'san.py').write_text("""
_base_ = 'acmix_mm::demo/retinanet_r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(_delete_=True, type='SAN', depth=10, base_channels=32),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
""")
    build(tmp_path / 'san.py', {}, tmp_path / 'san.pth')
    with pytest.raises(SystemExit, match=r'san\.py has nothing that could be folded'):
        switch_to_deploy.main([str(tmp_path / name) for name in ('san.py', 'san.pth', 'x.pth')])


def test_operators_of_no_config(tmp_path):
    """A network of somebody's own, which takes no argument for the form of its operators."""
    (tmp_path / 'own.py').write_text(f"""
_base_ = 'acmix_mm::demo/retinanet_r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(_delete_=True, type='{OwnBackbone.__name__}'), neck=dict(in_channels=[8] * 4)
)
""")
    build(tmp_path / 'own.py', {}, tmp_path / 'own.pth')
    with pytest.raises(SystemExit, match=r'no config builds the folded model of .*own\.py'):
        switch_to_deploy.main([str(tmp_path / name) for name in ('own.py', 'own.pth', 'x.pth')])
    assert {path.name for path in tmp_path.iterdir()} == {'own.py', 'own.pth'}


@torch.no_grad()
def check_onnx(backbone, file, size):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    x = torch.randn(1, 3, *size)
    outputs = session.run(['stage1', 'stage2', 'stage3', 'stage4'], {'image': x.numpy()})
    for ours, theirs in zip(map(torch.from_numpy, outputs), backbone(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.slow
def test_onnx(trained, tmp_path, capsys):
    pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    file = tmp_path / 'backbone.onnx'
    arguments = [CONFIG, str(trained[1]), str(file), '--cfg-options', *NARROW]
    export_onnx.main(arguments)
    assert capsys.readouterr().out.endswith(f'ONNX model: {file}\n')
    check_onnx(trained[0].backbone, file, (70, 131))  # a size that the program did not look at


@pytest.mark.parametrize(
    ('name', 'options', 'size'),
    [
        pytest.param('acmix-san10', {'depth': 10}, None, marks=pytest.mark.slow),
        ('acmix-swin-t', {'depths': [1, 1, 1, 1]}, (50, 70)),
        pytest.param('acmix-swin-t', {'depths': [2, 1, 1, 1]}, None, marks=pytest.mark.slow),
        *(
            pytest.param(
                'acmix-swin-t',
                {'depths': [1, 1, 1, 1], **more},
                (50, 70),
                marks=pytest.mark.slow,
            )
            for more in ({'shift': 'tensor'}, {'shift': 'fixed'}, {'kernel_groups': 1})
        ),
        *(
            pytest.param(
                'dwnet-t',
                {'arch.depths': [1, 1, 1, 1], 'dynamic': dynamic},
                None,
                marks=pytest.mark.slow,
            )
            for dynamic in ('homogeneous', 'inhomogeneous')
        ),
    ],
)
def test_onnx_of_other_families(name, options, size, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    monkeypatch.setattr(SAN, 'arch_settings', {10: (1, 1, 1, 1, 1)})  # small graphs export soon
    monkeypatch.setattr(SAN, 'kernel_sizes', (3, 3, 3, 3, 3))
    config = f'configs/demo/retinanet_{name}_fpn_scene-digits.py'
    options = {f'model.backbone.{key}': value for key, value in options.items()}
    files = [str(tmp_path / 'trained.pth'), str(tmp_path / 'backbone.onnx')]
    model = build(config, options, files[0])
    arguments = [config, *files, '--cfg-options', *(f'{k}={v}' for k, v in options.items())]
    arguments += ['--size', *map(str, size)] if size else []
    export_onnx.main(arguments)
    # A size that the program did not look at.
    check_onnx(model.backbone, files[1], size or ((71, 130) if 'san' in name else (96, 288)))


def test_wrong_arguments(trained, deployed, tmp_path):
    checkpoint = str(trained[1])
    for arguments, message in (
        ([CONFIG, checkpoint, str(tmp_path / 'x.pt')], r'OUT must end in \.pth'),
        ([CONFIG, checkpoint, str(tmp_path / 'no' / 'x.pth')], r'folder .*no does not exist'),
        ([CONFIG, checkpoint, str(deployed)], r'deployed\.pth exists already'),
        ([CONFIG, checkpoint, str(tmp_path / 'x.pth')], 'does not fit config'),
        (
            [str(deployed.with_suffix('.py')), str(deployed), str(tmp_path / 'x.pth')],
            'is deployed already',
        ),
        (
            ['configs/demo/retinanet_r26_fpn_scene-digits.py', checkpoint, str(tmp_path / 'x.pth')],
            'does not fit config',
        ),
    ):
        with pytest.raises(SystemExit, match=message):
            switch_to_deploy.main(arguments)
    with pytest.raises(SystemExit, match=r'OUT must end in \.onnx'):
        export_onnx.main([CONFIG, checkpoint, str(tmp_path / 'x.pth')])
    assert not list(tmp_path.iterdir())
    (tmp_path / 'there.onnx').touch()
    with pytest.raises(SystemExit, match=r'there\.onnx exists already'):
        export_onnx.main([CONFIG, checkpoint, str(tmp_path / 'there.onnx')])


def test_wrong_folding_is_not_written(trained, tmp_path, monkeypatch):
    def spoil(model):
        torch.nn.init.zeros_(model.backbone.conv1.weight)

    monkeypatch.setattr(switch_to_deploy, 'deploy', spoil)
    arguments = [CONFIG, str(trained[1]), str(tmp_path / 'x.pth'), '--cfg-options', *NARROW]
    with pytest.raises(SystemExit, match='the folded model deviates by'):
        switch_to_deploy.main(arguments)
    assert not list(tmp_path.iterdir())


def test_wrong_export_is_not_written(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(export_onnx, 'export', lambda backbone, size, out: out.touch())
    monkeypatch.setattr(export_onnx, 'check', lambda backbone, file, size: 0.1)
    arguments = [CONFIG, str(trained[1]), str(tmp_path / 'x.onnx'), '--cfg-options', *NARROW]
    with pytest.raises(SystemExit, match=r'does not give the results of PyTorch; .* not written'):
        export_onnx.main(arguments)
    assert not list(tmp_path.iterdir())


def test_neither_weights_nor_config_alone(trained, tmp_path, monkeypatch):
    def fail(file, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    monkeypatch.setattr(switch_to_deploy, 'write_checkpoint', fail)
    arguments = [CONFIG, str(trained[1]), str(tmp_path / 'x.pth'), '--cfg-options', *NARROW]
    with pytest.raises(SystemExit, match=r'error: .*x\.pth: No space left on device'):
        switch_to_deploy.main(arguments)
    assert not list(tmp_path.iterdir())
