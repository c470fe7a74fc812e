"""Checkpoints and models: which weights fit, and those from which models start."""

import contextlib
import copy
import functools
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.utils import import_modules_from_strings
from torch import nn

from .checkpoints import CheckpointNotFound, is_url, read_checkpoint, state_dict_of
from .config_check import data_classes
from .layers.deployable import Deployable, WrongForm

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


def build(cfg: Config, module: dict | None = None) -> nn.Module:
    """The model of a config, or a part of it.

    Args:
        cfg (Config): Says which packages to import.
        module (dict | None): The part's config. Default: None, for ``cfg.model``.
    """
    import_modules_from_strings(**cfg.get('custom_imports', {'imports': ['acmix_mm']}))
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    return MODELS.build(cfg.model if module is None else module)


def misfit(model: nn.Module, checkpoint: dict) -> str | None:
    """Load a checkpoint into a model, and say what keeps it from being the model's.

    The model's own loading decides, which may rename weights or leave some out.

    Args:
        model (nn.Module): Gets the weights as far as they fit.
        checkpoint (dict): See :func:`~acmix_mm.checkpoints.read_checkpoint`.

    Returns:
        str | None: Part of a sentence about the checkpoint, or None if all of its weights are the
        model's and it lacks none.
    """
    weights = state_dict_of(checkpoint)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    # Files from before PyTorch 0.4.1 have no counters of batches.
    missing = [n for n in shapes if n not in weights and not n.endswith('num_batches_tracked')]
    unexpected = [name for name in weights if name not in shapes]
    others = [name for name in shapes.keys() & weights if weights[name].shape != shapes[name]]
    try:
        result = model.load_state_dict(weights, strict=False)
        missing = [name for name in result.missing_keys if name in missing]
        unexpected = result.unexpected_keys
    except WrongForm:
        if any(isinstance(module, Deployable) and module.deployed for module in model.modules()):
            return (
                'it is of the model as it is trained, and the config of its form for inference, '
                'which tools/model_converters/switch_to_deploy.py makes of both'
            )
        return (
            'it is of the form for inference; its config is the file beside it that '
            'tools/model_converters/switch_to_deploy.py wrote'
        )
    except ValueError as error:  # kernels of another kind, see MixedOperator
        return ' '.join(str(error).split())
    except RuntimeError as error:
        if not others:
            return ' '.join(str(error).split())
    parts = []
    if missing:
        parts.append(f'{len(missing)} of {len(shapes)} weights are missing, such as {missing[0]}')
    if others:
        name = min(others, key=list(shapes).index)
        parts.append(
            f'{len(others)} of {len(shapes)} weights have another shape, such as {name}: '
            f'{tuple(weights[name].shape)} instead of {tuple(shapes[name])}'
        )
    if unexpected:
        parts.append(
            f'{len(unexpected)} of its {len(weights)} weights are not in the model, such as '
            f'{unexpected[0]}'
        )
    return ', '.join(parts) or None


def check_fit(model: nn.Module, checkpoint: dict, file: str, config: str) -> None:
    """Load a checkpoint into a model.

    Args:
        model (nn.Module): Gets the weights.
        checkpoint (dict): See :func:`~acmix_mm.checkpoints.read_checkpoint`.
        file (str): The checkpoint's name for the message.
        config (str): The model's.

    Raises:
        ValueError: Unless its weights are just those of the model.
    """
    problem = misfit(model, checkpoint)
    if problem:
        raise ValueError(f'checkpoint {file} does not fit config {config}: {problem}')


def check_classes(cfg: Config, split: str, checkpoint: dict, file: str) -> None:
    """Compare the classes of a checkpoint with those of the data, where both are said.

    A checkpoint of mmengine has the names of the classes that it was trained on. A line is printed
    if the data have others.

    Args:
        cfg (Config): Of the data.
        split (str): 'train', 'val' or 'test'.
        checkpoint (dict): See :func:`~acmix_mm.checkpoints.read_checkpoint`.
        file (str): The checkpoint's name.

    Raises:
        ValueError: If the data have the same classes in another order.
    """
    meta = checkpoint.get('meta')
    meta = meta.get('dataset_meta') if isinstance(meta, dict) else None
    trained = meta.get('classes') if isinstance(meta, dict) else None
    if not isinstance(trained, (list, tuple)):
        return
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmdet')):
        classes = data_classes(cfg)
    for place, names in classes.items():
        if not place.startswith(split) or names == tuple(trained):
            continue
        at = next((i for i, (a, b) in enumerate(zip(names, trained)) if a != b), None)  # noqa: B905
        if at is None or set(names) != set(trained):
            found = reprlib.repr(tuple(trained))
            print(f'warning: checkpoint {file} is of other classes than {place}: {found}')
            continue
        raise ValueError(
            f'checkpoint {file} is of the same classes as {place} in another order: class {at} '
            f'is {trained[at]!r} there, {names[at]!r} here'
        )


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
    """Check the checkpoints from which a config starts.

    Says it where only a part of a module's weights is in its checkpoint. To be called in one
    process, before work starts and after :func:`resolve_weights`.

    Raises:
        ValueError: In one line, if one cannot be had or read (see
            :func:`~acmix_mm.checkpoints.read_checkpoint`), has nothing for the module whose
            ``init_cfg`` names it, which is built and initialised for that, or if training cannot go
            on from ``load_from`` with ``resume``.
    """
    for start in _starts(cfg):
        try:
            checkpoint = read_checkpoint(start.file)
        except CheckpointNotFound as error:
            raise ValueError(start.missing(str(error))) from None
        place = start.place
        if place == 'load_from' and cfg.get('resume'):
            place = 'resuming'
            problem = _cannot_resume(cfg, checkpoint)
        elif place == 'load_from':
            model = build(cfg)
            weights = state_dict_of(checkpoint)
            load = functools.partial(load_state_dict, model, weights, logger='silent')
            problem = _try(model, start, load)
        elif start.module is not None:
            module = build(cfg, copy.deepcopy(start.module))
            problem = _try(module, start, module.init_weights)
        else:
            problem = None
        if problem:
            raise ValueError(f'checkpoint {start.file} is not for {place}: {problem}')


def _cannot_resume(cfg: Config, checkpoint: dict) -> str | None:
    """Why training cannot go on from a checkpoint, None if it can."""
    absent = [key for key in ('message_hub', 'optimizer') if key not in checkpoint]
    meta = checkpoint.get('meta')
    counts = meta if isinstance(meta, dict) else {}
    absent += [f'meta.{key}' for key in ('epoch', 'iter') if type(counts.get(key)) is not int]
    if absent:
        return (
            f'it has no state of a training ({", ".join(absent)}) to go on with; to start from its '
            'weights alone: --cfg-options load_from=FILE, without --resume'
        )
    check_classes(cfg, 'train', checkpoint, cfg.load_from)
    return misfit(build(cfg), checkpoint)


def _try(module: nn.Module, start: _Start, load: Callable[[], object]) -> str | None:
    """Load a checkpoint into a module; why it cannot serve, None if it can."""
    logger = MMLogger.get_current_instance()
    logger.disabled = True  # training says all of it again
    try:
        with names_loaded(module) as loaded:
            load()
    except (ValueError, RuntimeError, LookupError, AssertionError) as error:
        # What classes of others raise for names that they do not know.
        return f'{type(error).__name__}: {" ".join(str(error).split())}'
    finally:
        logger.disabled = False
    if not loaded:
        return f'it has none of the weights of {type(module).__name__}'
    names = [n for n in module.state_dict() if not n.endswith('num_batches_tracked')]
    new = [name for name in names if name not in loaded]
    if new:
        print(
            f'{start.place} starts with {len(names) - len(new)} of {len(names)} weights from '
            f'{start.file}; others, such as {new[0]}, keep their initial values'
        )
    return None
