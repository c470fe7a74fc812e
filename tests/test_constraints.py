"""The pinned versions: together, and for every Python that they are said to be for.

Wheels are resolved as pip resolves them, without those Pythons. PyTorch and what it brings is left
out, as it takes gigabytes, and so are packages that come as sources.
"""

import contextlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ('3.10', '3.11', '3.12', '3.13')
SOURCES = {
    'mmcv', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain', 'onedl-mmsegmentation'
}  # fmt: skip
LEFT_OUT = {'torch', 'torchvision', 'triton'}
EXTRAS = {
    'onedl': ('onedl', 'classification'),
    'openmmlab': ('openmmlab', 'classification-openmmlab'),
}


def holds(requirement: Requirement, python: str, extras: tuple[str, ...] = ()) -> bool:
    """Whether a requirement's marker is true for a Python."""
    here = {'python_version': python, 'python_full_version': f'{python}.0'}
    marker = requirement.marker
    return marker is None or any(marker.evaluate({**here, 'extra': e}) for e in ('', *extras))


def pins(file: str) -> list[Requirement]:
    """The lines of a file of constraints and of those that it includes."""
    found = []
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith('-c '):
            found += pins(line[3:])
        elif line and not line.startswith('#'):
            found.append(Requirement(line))
    return found


def needed(name: str, python: str, extras: tuple[str, ...]) -> set[str]:
    """What a distribution requires, and in the place of sources what these require."""
    found = set()
    for line in importlib.metadata.requires(name) or ():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if not holds(requirement, python, extras) or name in LEFT_OUT:
            continue
        if name in SOURCES:
            # Those of the other family than the running environment's say nothing.
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found |= needed(name, python, ())
        else:
            found.add(f'{requirement.name}{requirement.specifier}')
    return found


@pytest.mark.parametrize('family', EXTRAS)
def test_one_exact_version_each(family):
    for python in PYTHONS:
        names = []
        for pin in pins(f'constraints-{family}.txt'):
            if holds(pin, python):
                names.append(canonicalize_name(pin.name))
                assert re.fullmatch(r'==[\w.]+', str(pin.specifier)), pin
        assert len(names) == len({*names})


@pytest.mark.slow
@pytest.mark.parametrize('python', PYTHONS)
@pytest.mark.parametrize('family', EXTRAS)
def test_pins_resolve(family, python, tmp_path):
    pip = [sys.executable, '-m', 'pip']
    reach = [*pip, 'download', '--no-deps', '--dest', tmp_path / 'reach', 'wheel']
    if subprocess.run(reach, capture_output=True).returncode:
        pytest.skip('no package index can be reached')
    # pip would take markers to be about the Python that it runs in.
    constraints = tmp_path / 'constraints.txt'
    constraints.write_text(
        '\n'.join(
            f'{pin.name}{pin.specifier}'
            for pin in pins(f'constraints-{family}.txt')
            if holds(pin, python)
        )
    )
    extras = (*EXTRAS[family], 'demo', 'onnx', 'tensorboard', 'dev')
    command = [
        *pip, 'install', '--quiet', '--dry-run', '--ignore-installed', '--only-binary=:all:',
        '--target', tmp_path / 'none', '--python-version', python, '--constraint', constraints,
        *sorted(needed('acmix-mm', python, extras)),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
