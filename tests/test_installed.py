"""What an installed package has: operators, layers and their check need PyTorch alone.

Analyses need no sources.
"""

import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OPENMMLAB = ('mmcv', 'mmdet', 'mmengine', 'mmpretrain', 'mmseg')

TRAIN_A_STEP = """
import torch
import acmix_mm, acmix_mm.ops, acmix_mm.layers

layer = acmix_mm.layers.ACmix(8, 8)
optimizer = torch.optim.SGD(layer.parameters(), 0.01)
x = torch.randn(2, 8, 6, 7)
before = layer(x).square().mean()
before.backward()
optimizer.step()
assert layer(x).square().mean() < before
"""


def run(*command, cwd=ROOT, **variables) -> str:
    """Standard output of a command, which has to succeed."""
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONHOME')}
    result = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f'{result.stdout}\n{result.stderr}'
    return result.stdout


def run_python(code: str) -> str:
    return run(sys.executable, '-c', code)  # -c puts the working directory first


def test_trains_where_openmmlab_is_missing():
    # None in sys.modules: import raises ModuleNotFoundError, and find_spec finds nothing.
    run_python(f'import sys; sys.modules.update(dict.fromkeys({OPENMMLAB}))\n{TRAIN_A_STEP}')


@pytest.mark.parametrize('module', ['acmix_mm.ops', 'acmix_mm.layers', 'acmix_mm.check'])
def test_imports_no_openmmlab(module):
    """Not even where it is installed."""
    out = run_python(f'import sys, {module}; print(*(m.split(".")[0] for m in sys.modules))')
    assert not {*out.split()} & {*OPENMMLAB}


def requirements(*names: str) -> set[str]:
    """Names of distributions and of all that they need, where they are installed."""
    found, queue = set(), list(names)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({'extra': ''}):
                queue.append(requirement.name)
    return found


def expose(names: set[str], site_packages: Path) -> None:
    """Link what the running environment has of these distributions into another one."""
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {'..', '__pycache__'}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))


def copy_of_the_project(to: Path) -> Path:
    """Without what git ignores, and git's own."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        top = {'build', 'checkpoints', 'data', 'work_dirs'} if Path(folder) == ROOT else set()
        generated = {n for n in names if n == '__pycache__' or n.endswith(('.so', '.egg-info'))}
        return top | generated | {n for n in names if n.startswith('.') and n != '.mim'}

    return shutil.copytree(ROOT, to, ignore=left_out)


ANALYSE = """
import sys

import torch

sys.path.insert(0, sys.argv[1])
import acmix_mm

assert acmix_mm.__file__.startswith(sys.argv[1])
from acmix_mm.analysis import network_costs
from acmix_mm.analysis.attention import attentions_of
from acmix_mm.analysis.attention_page import write_page
from acmix_mm.analysis.comparison import compare
from acmix_mm.analysis.measuring import measure
from acmix_mm.analysis.path_bias import path_energy, path_rates
from acmix_mm.layers import ACmix

model = torch.nn.Sequential(ACmix(3, 8), torch.nn.ReLU(), ACmix(8, 8, stride=2)).eval()
images = torch.randn(1, 3, 20, 16)
assert network_costs(model, (20, 16)).whole.parameters == sum(p.numel() for p in model.parameters())
assert [rates.name for rates in path_rates(model)] == ['0', '2']
assert all(0 < e.attention_share < 1 for e in path_energy(model, lambda: model(images)))
first, _ = attentions_of(model, lambda: model(images))
weights = first.weights(torch.tensor([[3, 4]])).sum(-1)
assert torch.allclose(weights, torch.ones(1, 4))
"""


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the project, with the compiler that there is."""
    folder = tmp_path_factory.mktemp('wheel')
    project = copy_of_the_project(folder / 'project')
    build = ('pip', 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder, project)
    run(sys.executable, '-m', *build)
    assert not (project / 'acmix_mm' / '.mim').exists()
    shutil.rmtree(project)
    (wheel,) = folder.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory) -> Path:
    """An environment's Python with the wheel, and all other packages of the running environment."""
    venv = tmp_path_factory.mktemp('installed') / 'venv'
    run(sys.executable, '-m', 'venv', '--without-pip', venv)
    (site_packages,) = venv.glob('lib/python*/site-packages')
    install = ('pip', 'install', '--no-deps', '--target', site_packages, wheel)
    run(sys.executable, '-m', *install)
    # Behind the wheel; without what .pth files there add, such as an editable acmix_mm.
    (site_packages / 'others.pth').write_text(sysconfig.get_path('purelib'))
    return venv / 'bin' / 'python'


@pytest.mark.slow
def test_contents_of_a_wheel(wheel):
    """Configs, programs and the model index as OpenMMLab has them; a library without debugging."""
    with zipfile.ZipFile(wheel) as file:
        sizes = {info.filename: info.file_size for info in file.infolist()}
        (metadata,) = (n for n in sizes if n.endswith('.dist-info/METADATA'))
        headers = email.message_from_bytes(file.read(metadata))
    assert {name.split('/')[0].split('-')[0] for name in sizes} == {'acmix_mm'}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ('configs', 'tools')
        for path in (ROOT / folder).rglob('*')
        if path.is_file() and not {'dev', '__pycache__'} & {*path.parts}
    }
    in_mim = {n.removeprefix('acmix_mm/.mim/') for n in sizes if n.startswith('acmix_mm/.mim/')}
    assert in_mim == {*sources, 'model-index.yml', 'README.md'}
    (library,) = (name for name in sizes if name.endswith('.so'))
    assert sizes[library] < 4e6  # 16 MB with debug information
    assert wheel.stat().st_size < 4e6
    assert headers['Requires-Python'] == '>=3.10'
    assert headers['Description-Content-Type'] == 'text/markdown'
    assert headers['License-File'] == 'LICENSE'
    assert headers.get_payload().startswith('# acmix_mm')
    assert len(headers.get_all('Classifier')) > 5
    assert headers['Keywords']
    extras = {'onedl', 'openmmlab', 'classification', 'demo', 'onnx', 'tensorboard', 'dev'}
    assert extras <= {*headers.get_all('Provides-Extra')}


@pytest.mark.slow
def test_analyses_of_a_wheel(installed, tmp_path):
    """For a model of one's own, without the source tree; the page's template is in the wheel."""
    (site_packages,) = installed.parents[1].glob('lib/python*/site-packages')
    run(installed, '-c', ANALYSE, site_packages, cwd=tmp_path)
    assert (site_packages / 'acmix_mm' / 'analysis' / 'attention_page.html').is_file()


INHERITS = """
_base_ = 'acmix_mm::demo/retinanet_acmix-r26_fpn_scene-digits.py'
train_cfg = dict(max_epochs=1)
model = dict(test_cfg=dict(score_thr=0.0))
"""


@pytest.mark.slow
def test_programs_of_a_wheel(installed, tmp_path):
    """Data, training, test and prediction by the paths of mim, and a config that inherits one."""
    folder = run(installed, '-c', 'import acmix_mm; print(*acmix_mm.__path__)', cwd=tmp_path)
    mim = Path(folder.strip()) / '.mim'
    assert mim.is_relative_to(installed.parents[1])
    code = 'import acmix_mm; print(*acmix_mm.ops.available_backends())'
    assert 'native' in run(installed, '-c', code, cwd=tmp_path).split()

    def program(name: str, *arguments) -> str:
        return run(installed, mim / 'tools' / f'{name}.py', *arguments, cwd=tmp_path)

    program('dataset_converters/scene_digits', 'data/scene_digits', '--train', 12, '--val', 4,
            '--single-train', 10, '--single-val', 10)  # fmt: skip
    config = tmp_path / 'mine.py'
    config.write_text(INHERITS)
    out = program('train', config, '--work-dir', 'run')
    assert 'run/epoch_1.pth' in out
    config = mim / 'configs' / 'demo' / 'retinanet_acmix-r26_fpn_scene-digits.py'
    assert 'coco/bbox_mAP_50' in program(
        'test', config, 'run/epoch_1.pth', '--cfg-options', 'model.test_cfg.score_thr=0.0'
    )
    program('predict', 'data/scene_digits/coco/val2017', config, 'run/epoch_1.pth',
            '--out-dir', 'predictions')  # fmt: skip
    assert len(list((tmp_path / 'predictions' / 'vis').iterdir())) == 4
    program('demo', '--task', 'classification', '--work-dir', 'demo')
    assert (tmp_path / 'demo' / 'predictions.png').is_file()
    assert not {p.name for p in mim.iterdir()} - {
        'configs', 'tools', 'model-index.yml', 'README.md'
    }  # fmt: skip


@pytest.mark.slow
def test_isolated_build_is_for_the_torch_to_be_used(tmp_path):
    """pip builds in an environment of its own, whose compiler is to see the PyTorch of ours.

    It fails here, to save the minutes that it would take, and that is what is kept.
    """
    if subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--no-deps', '--dest', tmp_path, 'setuptools'],
        capture_output=True,
    ).returncode:
        pytest.skip('no package index can be reached')
    project = copy_of_the_project(tmp_path / 'project')
    build = ('pip', 'wheel', '--no-deps', '--wheel-dir', tmp_path, project)
    run(sys.executable, '-m', *build, CXX='false', CC='false')
    (wheel,) = tmp_path.glob('acmix_mm*.whl')
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith('native_build.txt'))
        assert "['false', '--version']" in file.read(name).decode()


@pytest.mark.slow
def test_installs_and_passes_beside_torch_alone(tmp_path):
    """In an environment with PyTorch, NumPy, pytest and Hypothesis."""
    run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    site_packages = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # pip and setuptools install the package.
    names = requirements('torch', 'numpy', 'pytest', 'hypothesis', 'pip', 'setuptools')
    expose(names, Path(site_packages.strip()))
    code = 'import pkgutil; print(*(m.name for m in pkgutil.iter_modules()))'
    present = set(run(python, '-c', code, cwd=tmp_path).split())
    assert not present & {*OPENMMLAB, 'acmix_mm', 'cv2', 'skimage'}

    project = copy_of_the_project(tmp_path / 'project')
    run(python, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', project)
    shutil.rmtree(project / 'acmix_mm')  # the tests are to see the installed one
    run(python, '-c', TRAIN_A_STEP, cwd=project)
    assert run(python, '-m', 'acmix_mm.check', cwd=project).endswith('comparisons ok\n')
    out = run(python, '-m', 'pytest', '-x', '-q', 'tests/ops', 'tests/layers', cwd=project)
    assert int(re.search(r'(\d+) passed', out)[1]) > 200, out
