import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_data import make_ade
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader

from acmix_mm.checkpoints import make_checkpoints_loadable
from acmix_mm.command_line import in_one_line, load_config
from acmix_mm.openmmlab import REQUIREMENTS, check_requirements


def run(code: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Python code in a process of its own, in which modules of the folder ``path`` come first."""
    if path is not None:
        code = f'import sys; sys.path.insert(0, {str(path)!r})\n{code}'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)


def without(path: Path, *packages: str) -> Path:
    """A folder that hides packages of OpenMMLab."""
    for name in packages:
        error = f'raise ModuleNotFoundError("No module named {name!r}", name={name!r})'
        (path / f'{name}.py').write_text(error)
    return path


def said(tmp_path, files: dict[str, str]) -> str:
    """What importing the backbones says where modules of these names and contents come first."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    result = run('import acmix_mm.backbones', tmp_path)
    assert result.returncode == 1
    return '\n'.join(result.stderr.splitlines()[-2:])


@pytest.mark.parametrize(
    'imports',
    [
        pytest.param(
            'import acmix_mm\nfrom mmengine.registry import MODELS', marks=pytest.mark.slow
        ),
        'from mmengine.registry import MODELS\nimport acmix_mm',
        pytest.param(
            'from acmix_mm.layers import ACmix\nfrom mmdet.registry import MODELS\nimport acmix_mm',
            marks=pytest.mark.slow,
        ),
        'import mmdet.models\nimport acmix_mm.ops\nfrom mmseg.registry import MODELS',
    ],
)
def test_registered_in_any_order(imports):
    code = f"""
{imports}
layer = MODELS.build(dict(type='ACmix', in_channels=8, out_channels=8))
assert type(layer) is acmix_mm.layers.ACmix, layer
model = MODELS.build(dict(type='SAN', depth=10, base_channels=32))
assert type(model) is acmix_mm.backbones.SAN is MODELS.get('SAN'), model
assert MODELS.get('ACmixResNet') is acmix_mm.backbones.ACmixResNet
layer = MODELS.build(dict(type='XVolution', in_channels=8, out_channels=8))
assert type(layer) is acmix_mm.layers.XVolution, layer
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('first', ['acmix_mm', 'mmengine.config'])
def test_configs_inherit_from_each_package(first, tmp_path):
    for scope in ('mmdet', 'mmseg'):
        (tmp_path / f'{scope}.py').write_text(f"_base_ = '{scope}::_base_/default_runtime.py'")
    code = f"""
import {first}, acmix_mm
from mmengine.config import Config
for scope in ('mmdet', 'mmseg'):
    assert Config.fromfile(f'{tmp_path}/{{scope}}.py').default_scope == scope
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize('first', ['acmix_mm', 'mmengine.config'])
def test_configs_inherit_ours(first, tmp_path):
    """From any folder, detectors, segmentors and parts; types keep the scope of the config."""
    for name, base in (
        ('detector', 'acmix_mm::demo/retinanet_acmix-r26_fpn_scene-digits.py'),
        ('segmentor', 'acmix_mm::demo/acmix-pvt_fpn_scene-digits.py'),
        ('part', 'acmix_mm::_base_/backbones/acmix-r26.py'),
        ('none', 'acmix_mm::demo/no.py'),
    ):
        (tmp_path / f'{name}.py').write_text(f"_base_ = ['{base}']\nx = dict(type='Resize')\n")
    code = f"""
import {first}, acmix_mm
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
read = lambda name: Config.fromfile(f'{tmp_path}/{{name}}.py')
for name, scope in (('detector', 'mmdet'), ('segmentor', 'mmseg')):
    cfg = read(name)
    assert cfg.default_scope == scope and '_scope_' not in cfg.pretty_text
    init_default_scope(scope)
    MODELS.build(cfg.model)
assert read('part').backbone.depth == 26
try:
    read('none')
except FileNotFoundError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert 'configs/demo/no.py' in result.stdout
    assert 'is not installed' not in result.stderr + result.stdout


def test_programs_take_inherited_configs(tmp_path):
    """Without an import of ours in the file: bases of mmengine's packages and of this one."""
    for name, base, scope in (
        ('theirs', 'mmseg::fcn/fcn-d6_r50-d16_4xb2-40k_cityscapes-512x1024.py', 'mmseg'),
        ('ours', 'acmix_mm::demo/retinanet_r26_fpn_scene-digits.py', 'mmdet'),
    ):
        (tmp_path / f'{name}.py').write_text(f"_base_ = '{base}'\n")
        assert load_config(str(tmp_path / f'{name}.py')).default_scope == scope


def test_module_looked_for_before_its_import(tmp_path):
    """What is to happen after an import waits for it, also where the module was looked for only."""
    (tmp_path / 'companion.py').write_text('')
    code = """
import importlib.util
from acmix_mm.openmmlab import _Watch
sys.meta_path.insert(0, _Watch('companion', lambda: print('acted')))
assert importlib.util.find_spec('companion')
print('found')
import companion
"""
    assert run(code, tmp_path).stdout.split() == ['found', 'acted']


def test_without_openmmlab(tmp_path):
    """A backbone says what it needs; for the layers, see test_installed.py."""
    without(tmp_path, 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    result = run('import acmix_mm; acmix_mm.backbones', tmp_path)
    assert result.returncode == 1
    assert "needs mmengine, and Python found no module 'mmengine'. Install it" in result.stderr


def test_with_mmengine_alone(tmp_path):
    """Layers are registered, and so are backbones, which say what they need when built."""
    without(tmp_path, 'mmcv', 'mmdet')
    code = """
import acmix_mm
from mmengine.registry import MODELS
MODELS.build(dict(type='ACmix', in_channels=8, out_channels=8))
MODELS.build(dict(type='ACmixResNet', depth=26))
"""
    result = run(code, tmp_path)
    assert result.returncode == 1
    assert "acmix_mm needs mmcv, and Python found no module 'mmcv'. Install it" in result.stderr


def test_names_of_others_are_not_taken():
    code = """
from mmengine.registry import MODELS
MODELS.register_module(name='ACmix', module=type('ACmix', (), {}))
import acmix_mm
"""
    result = run(code)
    assert result.returncode == 1
    assert "KeyError: 'ACmix is already registered in model" in result.stderr


@pytest.mark.parametrize(
    ('files', 'message', 'command'),
    [
        (
            {'mmdet.py': "raise ModuleNotFoundError('no', name='mmdet')"},
            "acmix_mm needs mmdet, and Python found no module 'mmdet'. Install it with:",
            'pip install onedl-mmdetection==3.5.1',
        ),
        (
            {'mmengine/__init__.py': "__version__ = '0.7.4'"},
            'acmix_mm needs mmengine >= 0.10.7, and found 0.7.4. Install it with:',
            'pip install onedl-mmengine==0.10.12',
        ),
        (
            {'mmcv/__init__.py': "__version__ = '2.3.6'"},  # mmcv-lite has no mmcv.ops
            "acmix_mm needs mmcv.ops, and Python found no module 'mmcv.ops'. Install it with:",
            'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir onedl-mmcv',
        ),
        (
            {
                'mmcv/__init__.py': "__version__ = '2.3.6'",
                'mmcv/ops.py': "raise ImportError('undefined symbol')",
            },
            'acmix_mm needs mmcv.ops, which is installed but does not import '
            '(ImportError: undefined symbol). Install it with:',
            'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir onedl-mmcv',
        ),
    ],
)
def test_backbones_say_what_is_missing(tmp_path, files, message, command):
    text = said(tmp_path, files)
    assert message in text
    assert command in text


def test_installed_packages_pass():
    check_requirements()


def test_install_commands_are_the_tested_versions(pytestconfig):
    constraints = (pytestconfig.rootpath / 'constraints-onedl.txt').read_text().splitlines()
    for requirement in REQUIREMENTS:
        pinned = requirement.install.split()[-1]
        assert pinned in constraints, requirement


def test_importing_does_not_change_what_torch_takes_for_safe():
    code = """
import mmdet.models
from torch.serialization import get_safe_globals
before = set(map(str, get_safe_globals()))
import acmix_mm.backbones
assert set(map(str, get_safe_globals())) == before
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


def test_history_buffers_load_safely(tmp_path):
    """Resuming: torch's safe loader takes what mmengine's message hub puts in a checkpoint."""
    make_checkpoints_loadable()  # OneDL's own loading, in other tests, withdraws registrations
    buffer = HistoryBuffer(log_history=np.arange(3.0), count_history=np.ones(3), max_length=5)
    hub = {'log_scalars': {'loss': buffer}, 'runtime_info': {'loss': np.float64(2), 'iter': 3}}
    torch.save({'message_hub': hub}, tmp_path / 'checkpoint.pth')
    loaded = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['message_hub']
    assert loaded['runtime_info'] == hub['runtime_info']
    loss = loaded['log_scalars']['loss']
    assert loss.mean() == 1
    for value in range(4):  # the greatest length came back, too
        loss.update(value)
    assert loss.data[0].tolist() == [2, 0, 1, 2, 3]


def test_mmpretrain_without_torchvision():
    """Its classifiers' parts import, also after somebody asked whether it is there at all."""
    pytest.importorskip('mmpretrain')
    result = run("""
import importlib.util, sys
sys.modules['torchvision'] = None
import acmix_mm
assert importlib.util.find_spec('mmpretrain') is not None
import mmpretrain.datasets, mmpretrain.evaluation, mmpretrain.models
assert not [name for name in sys.modules if name.startswith('torchvision')]
try:
    mmpretrain.models.utils.box_utils.boxes.box_iou(1, 2)
except ImportError as error:
    print(error)
""")
    assert result.returncode == 0, result.stderr
    message = 'torchvision.ops.boxes.box_iou is needed, but torchvision is not installed'
    assert result.stdout.splitlines() == [message]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('damaged', ['images/training/1.jpg', 'annotations/training/1.png'])
def test_errors_of_loading_name_the_files(damaged, workers, tmp_path):
    """Decoders see bytes only."""
    from mmseg.datasets import BaseSegDataset

    make_ade(tmp_path)
    (tmp_path / damaged).write_bytes(b'')
    with DATASETS.switch_scope_and_registry('mmseg'):
        dataset = BaseSegDataset(
            data_root=str(tmp_path),
            data_prefix={'img_path': 'images/training', 'seg_map_path': 'annotations/training'},
            pipeline=[{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}],
        )
    loader = DataLoader(dataset, batch_size=None, num_workers=workers)
    with pytest.raises(RuntimeError) as raised:
        list(loader)
    files = [f'{tmp_path}/{part}' for part in ('images/training/1.jpg', 'annotations/training/1')]
    message = in_one_line(raised.value)
    assert message.startswith(f'RuntimeError: {files[0]} and {files[1]}.png: ')
