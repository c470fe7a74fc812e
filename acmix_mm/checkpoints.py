"""How checkpoints are read: nothing in them runs, and none that is damaged passes.

Torch's safe loader (``weights_only``) reads them, with stand-ins for what OpenMMLab's and Swin's
training programs put beside weights. :func:`make_checkpoints_loadable` has mmengine use it, too.
"""

import copy
import http.client
import os
import re
import socket
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.serialization import add_safe_globals

PATIENCE = 60.0  # seconds that a server may take for its next word


class BadCheckpoint(ValueError):
    """A file that cannot serve as a checkpoint; the message is one line and names it."""


class CheckpointNotFound(BadCheckpoint, FileNotFoundError):
    """A checkpoint that is not there, or cannot be fetched."""


def is_url(file: str) -> bool:
    return file.startswith(('http://', 'https://'))


def read_checkpoint(file: str, map_location: str = 'cpu') -> dict:
    """Read a checkpoint with torch's safe loader, which runs no code in it.

    Args:
        file (str): A file, or a URL, which is fetched once into torch hub's cache, or what
            mmengine has another scheme for, such as ``torchvision://resnet50``.
        map_location (str): The device to which tensors go. Default: 'cpu'.

    Raises:
        CheckpointNotFound: If it is not there.
        BadCheckpoint: If it cannot be read, is damaged or no checkpoint, holds more than weights
            and plain values, or weights that are not finite. A file that torch >= 1.6 wrote has
            checksums of all that is in it, which are compared.

    Both are ValueErrors whose message is one line that begins with "checkpoint" and the file.
    """
    make_checkpoints_loadable()
    if '://' not in file or is_url(file):
        checkpoint = _read(file, map_location)
    else:
        checkpoint = _read_by_scheme(file, map_location)
    _check_weights(checkpoint, file)
    return checkpoint


def _read_by_scheme(file: str, map_location: str) -> object:
    try:
        return CheckpointLoader.load_checkpoint(file, map_location)
    except BadCheckpoint:
        raise
    except KeyError:
        raise CheckpointNotFound(
            f'checkpoint {file} does not exist: {file.partition("://")[0]} has no such model'
        ) from None
    except Exception as error:  # what storage of others and its packages raise
        raise CheckpointNotFound(
            f'checkpoint {file} cannot be fetched ({_in_short(error)})'
        ) from None


def _read(file: str, map_location: str | None) -> object:
    """What a file or URL holds, as it is."""
    path = _fetched(file) if is_url(file) else Path(os.path.expanduser(file))
    try:
        if not path.exists():
            raise CheckpointNotFound(f'checkpoint {file} does not exist')
        if not path.is_file():  # a pipe would be waited for
            kind = 'a folder' if path.is_dir() else 'no file with content of its own'
            raise BadCheckpoint(f'checkpoint {file} cannot be read: it is {kind}')
        damage = _damage(path)
        if damage is None:
            return torch.load(path, map_location=map_location, weights_only=True)
    except BadCheckpoint:
        raise
    except OSError as error:
        problem = error.strerror or error
        raise BadCheckpoint(f'checkpoint {file} cannot be read ({problem})') from None
    except Exception as error:  # for bytes that are no checkpoint, anything may be raised
        strange = _strange(error)
        if strange:
            raise BadCheckpoint(
                f'checkpoint {file} is refused: it holds {strange}, which is neither a weight nor '
                'a plain value and may run code; if its source is to be trusted, save the weights '
                'alone where it was written: torch.save(model.state_dict(), FILE)'
            ) from None
        damage = _in_short(error)
    raise BadCheckpoint(
        f'checkpoint {path} cannot be read, it may be damaged or no checkpoint ({damage})'
    )


def _fetched(url: str) -> Path:
    """A URL's file in torch hub's cache."""
    patience = socket.getdefaulttimeout()
    try:
        path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(url).path).name)
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(PATIENCE)
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise CheckpointNotFound(f'checkpoint {url} cannot be fetched ({error})') from None
    finally:
        socket.setdefaulttimeout(patience)
    return path


def _damage(path: Path) -> str | None:
    """What is wrong with a file in torch's zip format, whose checksums torch does not compare.

    None if nothing is, or if it has another format.
    """
    with open(path, 'rb') as file:
        start = file.read(4)
    if start != b'PK\x03\x04':  # an older format, without checksums, or none
        return None if start else 'it is empty'
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            return f'{twice} is in it twice'
        bad = archive.testzip()
    return None if bad is None else f'the checksum of {bad} is wrong'


def _strange(error: Exception) -> str | None:
    """What the safe loader has refused, from its message."""
    if isinstance(error, _NotPlain):
        return str(error)
    found = re.search(r'GLOBAL:? (\S+)', str(error))
    if found:
        return found[1]
    return 'a program, as torch.jit saves it' if 'TorchScript' in str(error) else None


def _in_short(error: Exception) -> str:
    """An error in one line, without the safe loader's advice to do without it."""
    text = str(error).rpartition('WeightsUnpickler error: ')[2].strip()
    return f'{type(error).__name__}: {re.split(r"[.:]? *$|[.] In PyTorch", text, flags=re.M)[0]}'


def state_dict_of(checkpoint: object) -> dict[str, Tensor]:
    """A checkpoint's weights, by their names without the ``module.`` of parallel wrappers.

    Args:
        checkpoint (object): What has been read from a file: a state dict, or a dict that holds one
            under ``state_dict``, as OpenMMLab's and SAN's, or ``model``, as Swin's.

    Returns:
        dict[str, Tensor]: Empty if it holds no weights.
    """
    for key in ('state_dict', 'model'):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    if not isinstance(checkpoint, dict):
        return {}
    weights = OrderedDict(
        (name, value)
        for name, value in checkpoint.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    )
    if isinstance(getattr(checkpoint, '_metadata', None), dict):  # versions of modules
        weights._metadata = copy.copy(checkpoint._metadata)
    consume_prefix_in_state_dict_if_present(weights, 'module.')
    return weights


def _check_weights(checkpoint: object, file: str) -> None:
    """Raises a BadCheckpoint unless there are weights, all of them finite."""
    weights = state_dict_of(checkpoint)
    if not weights:
        raise BadCheckpoint(f'checkpoint {file} holds no weights')
    averages = checkpoint.get('ema_state_dict')
    if isinstance(averages, dict):
        weights |= {f'ema_state_dict.{n}': v for n, v in state_dict_of(averages).items()}
    try:
        bad = [
            name
            for name, value in weights.items()
            if (value.is_floating_point() or value.is_complex()) and not value.isfinite().all()
        ]
    except (NotImplementedError, RuntimeError) as error:  # kinds of tensors that are no weights
        raise BadCheckpoint(
            f'checkpoint {file} is refused: its weights cannot be examined ({_in_short(error)})'
        ) from None
    if bad:
        raise BadCheckpoint(
            f'checkpoint {file} is refused: {len(bad)} of its {len(weights)} weights are not '
            f'finite, the first is {bad[0]}'
        )


def make_checkpoints_loadable() -> None:
    """Have all checkpoints of this process read as :func:`read_checkpoint` does; mmengine's, too.

    That is what ``init_cfg``, ``pretrained``, the Runner and inferencers name. The programs in
    tools/ call it before they load any, and so does whatever starts in a process of its own to
    load some; importing ``acmix_mm`` does not change what torch takes for safe.

    OneDL's mmengine goes on with the unsafe loader where the safe one refuses, and before that has
    the safe one take ``getattr``, with which a file can call anything. The original one reads with
    torch's default, and cannot resume with torch >= 2.6. Of what the Runner writes, ``meta`` may
    hold a ``config``, whose code it executes when it resumes; it is left out for it.
    """
    # For any other torch.load; torch takes both variables together for a mistake.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    os.environ.pop('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None)
    add_safe_globals(_STAND_INS)
    mmengine_checkpoint.get_torch_safe_globals = list  # of OneDL
    mmengine_checkpoint.load_from_http = load_from_file  # of model names in other schemes
    for scheme in ('', 'http://', 'https://'):
        if CheckpointLoader._schemes.get(scheme) is not load_from_file:
            CheckpointLoader.register_scheme(scheme, load_from_file, force=True)


def load_from_file(filename: str, map_location: str | None = None) -> dict:
    """What its loaders return, with the names of weights that its converters expect."""
    checkpoint = _read(filename, map_location)
    _check_weights(checkpoint, filename)
    weights = state_dict_of(checkpoint)
    if not isinstance(checkpoint.get('state_dict', checkpoint.get('model')), dict):
        return {'state_dict': weights}
    others = {key: value for key, value in checkpoint.items() if key != 'model'}
    if isinstance(others.get('meta'), dict):
        others['meta'] = {k: v for k, v in others['meta'].items() if k != 'config'}
    return {**others, 'state_dict': weights}


class _NotPlain(ValueError):
    """Says what a file holds that is no plain value."""


class _PlainConfig:
    """Stands for the config class of yacs, of which nothing runs and which need not be there."""

    def __new__(cls):
        return OrderedDict()  # which torch's safe loader fills, subclasses of dict it does not


class _Dtype:
    """Stands for ``numpy.dtype``, of which a file may have those of numbers alone.

    To numpy's own it could say anything, such as that numbers are addresses of objects.
    """

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not (isinstance(code, str) and re.fullmatch(r'[biufc]\d{1,2}', code)):
            raise _NotPlain(f'numpy.dtype({code!r})')
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        if state[1] == '>':
            self.dtype = self.dtype.newbyteorder('>')


class _Array(np.ndarray):
    """Stands for ``numpy.ndarray``."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, values = state
        array = np.frombuffer(values, dtype.dtype).reshape(shape, order='F' if fortran else 'C')
        super().__setstate__(array.__reduce__()[2])

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()


def _reconstruct(kind: type, shape: tuple, code: bytes) -> _Array:
    """Stands for numpy's function of that name; the array's state comes after it."""
    return np.zeros(0).view(_Array)


def _scalar(dtype: _Dtype, value: bytes) -> np.generic:
    """Stands for numpy's function of that name."""
    return np.frombuffer(value, dtype.dtype)[0]


def _getattr(holder: object, name: str) -> object:
    """Stands for ``getattr``, with which pickles of ``HistoryBuffer`` name its statistics."""
    if holder is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise _NotPlain('builtins.getattr')
    return getattr(holder, name)


_STAND_INS = [
    HistoryBuffer,  # the log's history, of numpy's arrays
    (_getattr, 'builtins.getattr'),
    (bytes, 'builtins.bytes'),  # of arrays without values
    (_Array, 'numpy.ndarray'),
    (_Dtype, 'numpy.dtype'),
    # Numpy 2 moved its functions; a file has the place that they had when it was written.
    *((_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    *((_reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    (_PlainConfig, 'yacs.config.CfgNode'),
]
