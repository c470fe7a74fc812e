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
        *(
            pytest.param(
                'acmix-swin-t',
                {'depths': [1, 1, 1, 1], **more},
                (50, 70),
                marks=pytest.mark.slow,
            )
            for more in ({'shift': 'tensor'}, {'shift': 'fixed'}, {'kernel_groups': 1})
        ),
        pytest.param(
            'dwnet-t',
            {'arch.depths': [1, 1, 1, 1], 'dynamic': 'inhomogeneous'},
            (50, 70),
            marks=pytest.mark.slow,
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
    if size:
        with pytest.raises(SystemExit, match=r'pads its maps.*choose one with --size'):
            export_onnx.main(arguments)
        arguments += ['--size', *map(str, size)]
    export_onnx.main(arguments)
    check_onnx(model.backbone, files[1], size or (71, 130))


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
    def spoil(backbone):
        torch.nn.init.zeros_(backbone.conv1.weight)

    monkeypatch.setattr(switch_to_deploy, 'deploy', spoil)
    arguments = [CONFIG, str(trained[1]), str(tmp_path / 'x.pth'), '--cfg-options', *NARROW]
    with pytest.raises(SystemExit, match='the folded backbone deviates by'):
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
