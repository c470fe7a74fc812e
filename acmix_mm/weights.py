"""Checkpoints: read without running code in them; those from which models start."""

import contextlib
import copy
import re
import sys
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from .openmmlab import make_checkpoints_loadable

FOLDER = Path('checkpoints')  # what lies there takes precedence over a URL

# Where files come from, by patterns of their names, the first that fits.
SOURCES = {
    'acmix_swin_*_patch4_window7_224.pth': "the link of Swin-ACmix in the authors' release, "
    'https://github.com/LeapLabTHU/ACmix, saved under this name',
    'swin_*_patch4_window7_224.pth': "Swin's release, "
    'https://github.com/SwinTransformer/storage/releases/tag/v1.0.0',
    'pvt_*.pth': "PVT's release, https://github.com/whai362/PVT/releases/tag/v2",
    '*dwnet_*_224.pth': "DWNet's release, "
    'https://github.com/Atten4Vis/DemystifyLocalViT/releases/tag/prerelease',
    'san*_patchwise.pth': 'model_best.pth in the folder of that network, which the README of '
    'https://github.com/hszhao/SAN links, saved under this name',
    'resnet50-*.pth': 'torchvision, https://download.pytorch.org/models/',
    'acmix-r26_single-digits.pth': 'make demo TASK=classification',
    '*_in1k.pth': 'training with configs/imagenet/{name}_*_in1k.py (nobody has published it)',
}


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
    return {
        name.removeprefix('module.'): value
        for name, value in checkpoint.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


class CheckpointNotFound(ValueError):
    """A checkpoint that is not there, or cannot be fetched."""


def is_url(file: str) -> bool:
    return file.startswith(('http://', 'https://'))


def _fetched(url: str) -> Path:
    """Where torch hub keeps it."""
    return Path(torch.hub.get_dir(), 'checkpoints', url.rsplit('/', 1)[-1])


def read_checkpoint(file: str) -> dict:
    """Read a checkpoint into CPU memory with torch's safe loader, which runs no code in it.

    Args:
        file (str): A file, or a URL, which is fetched once into torch hub's cache. Other schemes,
            such as ``torchvision://``, are left to mmengine.

    Raises:
        CheckpointNotFound: If it is not there; a ValueError, too.
        ValueError: If it cannot be read, is no checkpoint, or holds more than weights and plain
            values. All messages are one line that begins with "checkpoint" and the file.
    """
    make_checkpoints_loadable()
    options = {'map_location': 'cpu', 'weights_only': True}
    try:
        if is_url(file):
            checkpoint = torch.hub.load_state_dict_from_url(file, **options)
        elif '://' in file:
            checkpoint = CheckpointLoader.load_checkpoint(file, map_location='cpu')
        else:
            checkpoint = torch.load(Path(file).expanduser(), **options)
    except FileNotFoundError:
        raise CheckpointNotFound(f'checkpoint {file} does not exist') from None
    except urllib.error.URLError as error:  # an OSError, too
        raise CheckpointNotFound(f'checkpoint {file} cannot be fetched ({error})') from None
    except Exception as error:  # for bytes that are no checkpoint, anything may be raised
        found = re.search(r'GLOBAL:? (\w+(\.\w+)+)', str(error))
        if found:
            raise ValueError(
                f'checkpoint {file} is refused: it holds {found[1]}, which is neither a weight nor '
                'a plain value and may run code'
            ) from None
        raise ValueError(
            f'checkpoint {_fetched(file) if is_url(file) else file} cannot be read, it may be '
            f'damaged or no checkpoint ({type(error).__name__}: {str(error).partition(chr(10))[0]})'
        ) from None
    if not state_dict_of(checkpoint):
        raise ValueError(f'checkpoint {file} holds no weights')
    return checkpoint


@contextlib.contextmanager
def names_loaded(module: nn.Module) -> Iterator[set[str]]:
    """Context with the names of the module's weights that are loaded within it."""
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    loaded: set[str] = set()

    def inspect(module: nn.Module, state_dict: dict, *args) -> None:
        for name in shapes.keys() & state_dict.keys():
            if shapes[name] == state_dict[name].shape:
                loaded.add(name)

    hook = module.register_load_state_dict_pre_hook(inspect)
    try:
        yield loaded
    finally:
        hook.remove()


def checkpoint_of(init_cfg: dict | list[dict] | None) -> dict | None:
    """The part of an ``init_cfg`` that names a checkpoint, None if there is none."""
    parts = init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]
    return next((part for part in parts if part and part.get('checkpoint')), None)


@dataclass(frozen=True)
class _Start:
    """A checkpoint that a config names.

    Attributes:
        place (str): The dotted name of what starts from it, or of the setting itself.
        holder (dict): The dict that names it, under ``key``.
        module (dict | None): The config of the module whose ``init_cfg`` it is.
    """

    place: str
    holder: dict
    key: str
    module: dict | None = None

    @property
    def file(self) -> str:
        return self.holder[self.key]

    def missing(self, problem: str) -> str:
        """The message: what is wrong, where the file comes from, how to go on without it."""
        name = Path(self.file).name
        source = next((text for pattern, text in SOURCES.items() if fnmatch(name, pattern)), None)
        lines = [f'{problem}, and {self.place} starts from it']
        if source:
            lines.append(f'it comes from {source.format(name=name.removesuffix("_in1k.pth"))}')
        if is_url(self.file):
            lines.append(f'a file {FOLDER / name} is taken in its place')
        if self.module:
            options = [f'{self.place}.init_cfg=None'] + [
                f'{self.place}.{key}={value}'
                for key, value in (
                    ('warm_start', False), ('frozen_stages', -1), ('norm_eval', False)
                )
                if self.module.get(key) not in (None, value)
            ]  # fmt: skip
            lines.append(
                f'to go on without it, with more epochs: --cfg-options {" ".join(options)}'
            )
        return '; '.join(lines)


def _starts(cfg: Config) -> Iterator[_Start]:
    if cfg.get('load_from'):
        yield _Start('load_from', cfg, 'load_from')
    waiting = [('model', cfg.get('model'))]
    while waiting:
        place, node = waiting.pop()
        if isinstance(node, (list, tuple)):
            waiting += [(f'{place}.{i}', item) for i, item in enumerate(node)]
        elif isinstance(node, dict):
            init_cfg = checkpoint_of(node.get('init_cfg'))
            if init_cfg:
                yield _Start(place, init_cfg, 'checkpoint', node)
            if isinstance(node.get('pretrained'), str):
                yield _Start(f'{place}.pretrained', node, 'pretrained')
            waiting += [(f'{place}.{k}', v) for k, v in node.items() if k != 'init_cfg']


def resolve_weights(cfg: Config) -> None:
    """Take files of ``checkpoints/`` in the place of URLs of the same name, in place.

    For every checkpoint from which a config starts: of each ``init_cfg`` and ``pretrained`` in
    ``model``, and ``load_from``. To be called in every process of a job.
    """
    for start in _starts(cfg):
        local = FOLDER / start.file.rsplit('/', 1)[-1]
        if is_url(start.file) and local.is_file():
            print(f'{start.place} starts from {local}, in the place of {start.file}')
            start.holder[start.key] = str(local)


def check_starts(cfg: Config) -> None:
    """Exit with a message if a checkpoint from which a config starts cannot serve.

    That is, cannot be had or read (see :func:`read_checkpoint`), or has nothing for the module
    whose ``init_cfg`` names it; the module is built and initialised for that. URLs are fetched;
    what other schemes name, such as ``torchvision://``, is not looked at. To be called in one
    process, before work starts and after :func:`resolve_weights`.
    """
    for start in _starts(cfg):
        if '://' in start.file and not is_url(start.file):
            continue
        try:
            read_checkpoint(start.file)
        except CheckpointNotFound as error:
            sys.exit(f'error: {start.missing(str(error))}')
        except ValueError as error:
            sys.exit(f'error: {error}')
        if start.module is not None:
            _check_use(cfg, start)


def _check_use(cfg: Config, start: _Start) -> None:
    import_modules_from_strings(**cfg.get('custom_imports', {'imports': ['acmix_mm']}))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    config = copy.deepcopy(start.module)
    if is_url(start.file):
        # mmengine would wait for all processes of a job before it takes the file from there.
        checkpoint_of(config['init_cfg'])['checkpoint'] = str(_fetched(start.file))
    module = MODELS.build(config)
    logger = MMLogger.get_current_instance()
    logger.disabled = True  # training says all of it again
    try:
        with names_loaded(module) as loaded:
            module.init_weights()
        problem = None if loaded else f'it has none of the weights of {type(module).__name__}'
    except (ValueError, RuntimeError, LookupError, AssertionError) as error:
        # What classes of others raise for names that they do not know.
        problem = f'{type(error).__name__}: {" ".join(str(error).split())}'
    finally:
        logger.disabled = False
    if problem:
        sys.exit(f'error: checkpoint {start.file} is not for {start.place}: {problem}')
