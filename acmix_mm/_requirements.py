"""Checks the OpenMMLab packages when acmix_mm is imported, and mends one known fault.

Two families provide them under the same import names: OneDL (``onedl-*``, maintained, tested) and
the original OpenMMLab packages. Versions are those that were tried.
"""

import importlib
from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True)
class Requirement:
    """A package that must import, its least version and the command that installs it."""

    module: str
    minimum: str
    install: str


REQUIREMENTS = (
    Requirement('mmengine', '0.10.7', 'pip install onedl-mmengine==0.10.12'),
    Requirement(
        'mmcv',
        '2.1.0',
        'pip install ninja psutil wheel setuptools && '
        'MMCV_WITH_OPS=1 pip install --no-build-isolation onedl-mmcv==2.3.6',
    ),
    # Its compiled operators. mmcv-lite has none; a build for another torch does not load.
    Requirement(
        'mmcv.ops',
        '',
        'pip uninstall -y mmcv mmcv-lite onedl-mmcv && '
        'pip install ninja psutil wheel setuptools && '
        'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir onedl-mmcv==2.3.6',
    ),
    Requirement('mmdet', '3.3.0', 'pip install onedl-mmdetection==3.5.1'),
)


def check_requirements() -> None:
    """Import what the package needs.

    Raises:
        ImportError: If one is missing, too old or does not load; the message names it, what was
            found, and the command that installs it.
    """
    for requirement in REQUIREMENTS:
        name = requirement.module
        advice = f'Install it with:\n    {requirement.install}'
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f'acmix_mm needs {name}, and Python found no module {error.name!r}. {advice}'
            ) from error
        except Exception as error:
            raise ImportError(
                f'acmix_mm needs {name}, which is installed but does not import '
                f'({type(error).__name__}: {error}). {advice}'
            ) from error
        found = getattr(module, '__version__', None)
        if requirement.minimum and Version(found) < Version(requirement.minimum):
            raise ImportError(
                f'acmix_mm needs {name} >= {requirement.minimum}, and found {found}. {advice}'
            )


def allow_history_buffers() -> None:
    """Let torch >= 2.6 load mmengine's checkpoints with its safe loader.

    They hold a ``HistoryBuffer``, which the loader refuses unless it is registered; OneDL's
    mmengine loads them anyway, the original's resuming fails without this.
    """
    from mmengine.logging.history_buffer import HistoryBuffer
    from torch.serialization import add_safe_globals

    add_safe_globals([HistoryBuffer])
