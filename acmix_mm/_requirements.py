"""Checks the OpenMMLab packages when acmix_mm is imported, and mends one known fault.

Two families provide them under the same import names: OneDL (``onedl-*``, maintained, tested) and
the original OpenMMLab packages. Versions are those that were tried.
"""

import copyreg
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


def make_checkpoints_loadable() -> None:
    """Make checkpoints of mmengine's Runner load with torch's safe loader (``weights_only``).

    They hold the log's history as ``HistoryBuffer``, which torch >= 2.6 refuses, so that resuming
    with the original mmengine fails and OneDL's falls back to the unsafe loader. Here the class is
    registered as safe, with the numpy objects in it, and is pickled by its constructor: by default
    a pickle of it also calls ``getattr``, which no safe loader can allow.
    """
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer
    from torch.serialization import add_safe_globals

    copyreg.pickle(HistoryBuffer, _reduce_history_buffer)
    dtypes = {type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float']}
    functions = [np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]]
    # numpy 2 moved these functions; a file names them by the place they had when it was written.
    names = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for function in functions
        for core in ('core', '_core')
    ]
    add_safe_globals([HistoryBuffer, np.ndarray, np.dtype, *dtypes, *names])


def _reduce_history_buffer(buffer):
    log_history, count_history = buffer.data
    return type(buffer), (log_history, count_history, buffer.max_length)
