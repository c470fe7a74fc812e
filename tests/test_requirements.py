import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from acmix_mm.openmmlab import REQUIREMENTS, check_requirements, make_checkpoints_loadable


def import_with(tmp_path, files: dict[str, str]) -> str:
    """What ``import acmix_mm`` says where modules of these names and contents come first."""
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    code = f'import sys; sys.path.insert(0, {str(tmp_path)!r}); import acmix_mm'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode == 1
    return result.stderr.splitlines()[-2] + '\n' + result.stderr.splitlines()[-1]


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
def test_import_says_what_is_missing(tmp_path, files, message, command):
    said = import_with(tmp_path, files)
    assert message in said
    assert command in said


def test_installed_packages_pass():
    check_requirements()


def test_install_commands_are_the_tested_versions(pytestconfig):
    constraints = (pytestconfig.rootpath / 'constraints.txt').read_text().splitlines()
    for requirement in REQUIREMENTS:
        pinned = requirement.install.split()[-1]
        assert pinned in constraints, requirement


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
