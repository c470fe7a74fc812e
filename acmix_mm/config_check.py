"""Config files that are refused before work starts, each with one line that names file and key.

What a class of OpenMMLab demands of its arguments is asked of the class: the model, transforms,
optimisers and schedules are built once, which needs neither data nor checkpoints; for what cannot
be built without data, arguments are compared with the class's signature.
"""

import contextlib
import copy
import difflib
import inspect
import io
import logging
import re
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    DefaultScope,
    Registry,
)
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

# What is read of a config: by the Runner as its arguments and from the config itself, and by
# programs. All else only helps a config file to say it.
KEYS_READ = {*inspect.signature(Runner).parameters} - {'cfg'} | {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}
# Usual variables of config files whose settings have another name.
VARIABLES = {
    'dataset_type': 'dataset.type',
    'train_pipeline': 'train_dataloader.dataset.pipeline',
    'val_pipeline': 'val_dataloader.dataset.pipeline',
    'test_pipeline': 'test_dataloader.dataset.pipeline',
}

# Where the types below a key are registered.
REGISTRIES = {
    'model': (MODELS, TASK_UTILS),
    'tta_model': (MODELS,),
    'train_dataloader': (DATASETS, TRANSFORMS, DATA_SAMPLERS, FUNCTIONS),
    'val_dataloader': (DATASETS, TRANSFORMS, DATA_SAMPLERS, FUNCTIONS),
    'test_dataloader': (DATASETS, TRANSFORMS, DATA_SAMPLERS, FUNCTIONS),
    'tta_pipeline': (TRANSFORMS,),
    'optim_wrapper': (OPTIM_WRAPPERS, OPTIMIZERS),
    'param_scheduler': (PARAM_SCHEDULERS,),
    'train_cfg': (LOOPS,),
    'val_cfg': (LOOPS,),
    'test_cfg': (LOOPS,),
    'val_evaluator': (EVALUATOR, METRICS),
    'test_evaluator': (EVALUATOR, METRICS),
    'default_hooks': (HOOKS,),
    'custom_hooks': (HOOKS,),
    'visualizer': (VISUALIZERS, VISBACKENDS),
    'log_processor': (LOG_PROCESSORS,),
}
# The heads whose classes are those of the data.
HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head', 'head')
# Types of arguments that texts are often mistaken for.
NUMBERS = {bool, int, float}


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_natural(value: object) -> bool:
    return _is_whole(value) and value >= 0


def _is_positive(value: object) -> bool:
    return _is_whole(value) and value > 0


def _is_amount(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _is_size(value: object) -> bool:
    if isinstance(value, (list, tuple)) and any(isinstance(v, (list, tuple)) for v in value):
        return all(_is_size(v) for v in value)
    values = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return value is None or all(isinstance(v, (int, float)) for v in values)


# Values that nobody looks at before work has started, by patterns of their places.
POSITIVE, NATURAL = (_is_positive, 'a positive integer'), (_is_natural, 'an integer, at least 0')
VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    '*_dataloader.batch_size': POSITIVE,
    '*_dataloader.num_workers': NATURAL,
    'train_cfg.max_epochs': POSITIVE,
    'train_cfg.max_iters': POSITIVE,
    'train_cfg.val_begin': NATURAL,
    'train_cfg.val_interval': (lambda v: isinstance(v, (int, float)) and v > 0, 'above 0'),
    'model.*num_classes': POSITIVE,
    'auto_scale_lr.base_batch_size': POSITIVE,
    'optim_wrapper.accumulative_counts': POSITIVE,
    'optim_wrapper.*lr': (_is_amount, 'a number, at least 0'),
    'optim_wrapper.*momentum': (_is_amount, 'a number, at least 0'),
    'optim_wrapper.*weight_decay': (_is_amount, 'a number, at least 0'),
    '*_hooks.*.interval': (_is_whole, 'an integer'),
    **dict.fromkeys(
        (f'*pipeline.*.{name}' for name in ('scale', 'scales', 'img_scale', 'crop_size')),
        (_is_size, 'a number, a pair of them or a list of pairs'),
    ),
    'randomness.seed': (lambda v: v is None or _is_natural(v), 'None or an integer, at least 0'),
    'load_from': (lambda v: v is None or isinstance(v, str), 'None or a file'),
    'work_dir': (lambda v: v is None or isinstance(v, str), 'None or a folder'),
    'resume': (lambda v: isinstance(v, bool), 'True or False'),
    'log_level': (
        lambda v: isinstance(logging.getLevelName(v), int),
        "'INFO', 'WARNING' or the like",
    ),
    **dict.fromkeys(
        ('model', '*_dataloader', 'optim_wrapper', 'train_cfg', 'default_hooks', 'randomness'),
        (lambda v: v is None or isinstance(v, dict), 'a dict'),
    ),
}


def read_config(file: str) -> Config:
    """Read a config file and those that it inherits from.

    Args:
        file (str): Of any of mmengine's kinds.

    Raises:
        ValueError: If it cannot be read. The message is one line, with the file at fault, which may
            be one that is inherited from, and the line there, if any is.
    """
    if not Path(file).is_file():
        raise ValueError(f'config {file} does not exist')
    try:
        cfg = Config.fromfile(file)
        for _ in settings_of(cfg):  # what is imported by name is imported now
            pass
        return cfg
    except Exception as error:  # it runs the file, which may do anything
        reading = _files_being_read(error) or [file]
        message = reason(error)
        if isinstance(error, RecursionError):
            message = f'inherits from itself, by {" and ".join(dict.fromkeys(reading))}'
        elif isinstance(error, SyntaxError) or isinstance(error.__context__, SyntaxError):
            syntax = error if error.lineno else error.__context__
            message = f'line {syntax.lineno}: {syntax.msg}'
        raise ValueError(f'config {reading[-1]}: {message}') from error


def _files_being_read(error: Exception) -> list[str]:
    """The config files that mmengine was reading, those that inherit first."""
    files = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        name, where = frame.f_code.co_name, frame.f_locals
        if name in ('_file2dict', '_parse_lazy_import'):
            files.append(where['filename'])
        elif name == '<module>' and files and frame.f_code.co_filename == files[-1]:
            files.append(f'{files.pop()}, line {line}')
    return files


def reason(error: BaseException) -> str:
    """What an error says, in one line: its type and message, of a bare assertion its condition."""
    text = ' '.join(str(error.args[0] if isinstance(error, KeyError) else error).split())
    if isinstance(error, AssertionError) and not text:
        text = traceback.extract_tb(error.__traceback__)[-1].line or 'an assertion does not hold'
    return f'{type(error).__name__}: {text}'


def nearest(name: str, names: Iterable[str]) -> str:
    """', did you mean X?' with the most similar of some names, nothing where none is similar."""
    found = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {found[0]}?' if found else ''


# Options of the command line.


def merge_options(cfg: Config, options: dict[str, object]) -> None:
    """Set ``--cfg-options`` in a config, in place.

    Args:
        cfg (Config): The config.
        options (dict[str, object]): Values by dotted names; an integer is the place in a list.

    Raises:
        ValueError: If nothing would read an option, which then says where the setting is, or if
            there is no such place in the config.
    """
    for option in options:
        _check_option(option, options, cfg)
    try:
        cfg.merge_from_dict(options)
    except (AttributeError, KeyError, TypeError) as error:  # options that exclude each other
        names = ' '.join(options)
        raise ValueError(f'--cfg-options {names}: cannot all be set, {reason(error)}') from None


def _check_option(option: str, options: dict[str, object], cfg: Config) -> None:
    key, *parts = option.split('.')
    if not all([key, *parts]):
        raise ValueError(f'--cfg-options {option}: a name between dots is empty')
    if key not in KEYS_READ:
        name = VARIABLES.get(key, key)
        places = [p for p, _ in settings_of(cfg) if f'.{p}'.endswith(f'.{name}')]
        least = min((place.count('.') for place in places), default=0)
        places = ', '.join(place for place in places if place.count('.') == least)
        advice = f'the setting is {places}' if places else 'no setting has this name'
        raise ValueError(f'--cfg-options {option}: nothing reads {key} of a config; {advice}')
    node, place = cfg, ''
    for part in (key, *parts):
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ValueError(
                    f'--cfg-options {option}: {place} is a list of {len(node)}, its elements are '
                    f'named 0 to {len(node) - 1}, got {part}'
                )
            node = node[int(part)]
        elif isinstance(node, (dict, Config)):
            if part not in node:
                return  # set anew
            node = node[part]
        elif f'{place}._delete_' in options:
            return  # replaced
        else:
            raise ValueError(f'--cfg-options {option}: {place} is {node!r}, which has no {part}')
        place = f'{place}.{part}'.lstrip('.')


def setting(cfg: Config, key: str) -> object:
    """A value by its dotted name, None where there is none."""
    for part in key.split('.'):
        cfg = cfg.get(part) if isinstance(cfg, (dict, Config)) else None
    return cfg


def settings_of(node: object, place: str = '') -> Iterator[tuple[str, object]]:
    """Dotted names and values of all settings that are read, of elements of lists, too."""
    if isinstance(node, (dict, Config)):
        entries = node.items()
    else:
        entries = enumerate(node) if isinstance(node, (list, tuple)) else ()
    for key, value in entries:
        if place or key in KEYS_READ:
            name = f'{place}.{key}'.lstrip('.')
            yield name, value
            yield from settings_of(value, name)


# Whole configs.


def checked_config(
    file: str, options: dict[str, object] | None = None, needs: Iterable[str] = ()
) -> Config:
    """A config file with options, checked.

    Args:
        file (str): Of any of mmengine's kinds.
        options (dict[str, object] | None): See :func:`merge_options`. Default: None.
        needs (Iterable[str]): Top-level keys that must be there. Default: none.

    Raises:
        ValueError: In one line, if it cannot be read, if it is for mmpretrain, the one package of
            OpenMMLab that is optional, which is not installed, if it lacks a key of ``needs``, or
            for what :func:`check_config` finds.
    """
    cfg = read_config(file)
    if cfg.get('default_scope') == 'mmpretrain' and find_spec('mmpretrain') is None:
        raise ValueError(
            f'config {file} is for mmpretrain, which is not installed: '
            f'pip install onedl-mmpretrain==1.3.6'
        )
    if options:
        merge_options(cfg, options)
    for key in needs:
        if cfg.get(key) is None:
            raise ValueError(f'config {file} has no {key}')
    check_config(cfg, file)
    return cfg


def check_config(cfg: Config, file: str) -> None:
    """Check what a config says, as far as it can be told without data and checkpoints.

    Top-level keys that nothing reads but that resemble one that is read; types that are not
    registered; arguments that classes do not take, or not in this type; counts out of range; the
    classes of heads and data. Model, transforms, optimisers and schedules are built for that, the
    model without initialising its weights.

    Args:
        cfg (Config): The config; it stays as it is.
        file (str): What to call it.

    Raises:
        ValueError: For the first fault. The message is one line with file, dotted name, value and
            what is allowed.
    """
    scope = cfg.get('default_scope') or 'mmdet'  # as programs that build the model
    try:
        _check_names(cfg)
        _check_values(cfg)
        _check_loops(cfg)
        if find_spec(scope) is None:
            raise ValueError(f'default_scope: no package {scope!r} is installed')
        with DefaultScope.overwrite_default_scope(scope), _quiet():
            for place, node, kind in _typed(cfg):
                _check_arguments(place, node, kind)
            _build_parts(cfg)
            _check_classes(cfg)
    except ValueError as error:
        raise ValueError(f'config {file}: {error}') from error.__cause__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context in which nothing is said that is said again when work starts."""
    logger = MMLogger.get_current_instance()
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.disabled = disabled


def _check_names(cfg: Config) -> None:
    for key, value in cfg.items():
        if key in KEYS_READ or key in VARIABLES:
            continue
        for name in difflib.get_close_matches(key, KEYS_READ, n=1, cutoff=0.8):
            matcher = difflib.SequenceMatcher(None, key, name)
            equal = sum(block.size for block in matcher.get_matching_blocks())
            # A few letters, and what is there, if anything, is not of another kind.
            if len(key) + len(name) - 2 * equal <= 2 and isinstance(
                value, type(cfg.get(name, value))
            ):
                raise ValueError(f'{key}: nothing reads this key; did you mean {name}?')


def _check_values(cfg: Config) -> None:
    for place, value in settings_of(cfg):
        for pattern, (allowed, text) in VALUES.items():
            if fnmatch(place, pattern) and not allowed(value):
                raise ValueError(f'{place} must be {text}, got {value!r}')
        lacks_type = isinstance(value, dict) and 'type' not in value and value
        if lacks_type and any(pattern.fullmatch(place) for pattern in NEED_TYPE):
            raise ValueError(f'{place} must have a type, it has {", ".join(value)}')


def _check_loops(cfg: Config) -> None:
    """What the Runner takes together or not at all."""
    for keys in (
        ('train_dataloader', 'train_cfg', 'optim_wrapper'),
        ('val_dataloader', 'val_cfg', 'val_evaluator'),
        ('test_dataloader', 'test_cfg', 'test_evaluator'),
    ):
        missing = [key for key in keys if cfg.get(key) is None]
        if 0 < len(missing) < len(keys):
            names = f'{keys[0]}, {keys[1]} and {keys[2]}'
            raise ValueError(f'{names} go together, {missing[0]} is missing')


def _typed(cfg: Config) -> Iterator[tuple[str, dict, object]]:
    """Place, config and class or function of all that is of a type, registered or understood."""
    by_epoch = (cfg.get('train_cfg') or {}).get('by_epoch', True)
    for key, kind in {
        'train_cfg': EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop,
        'val_cfg': ValLoop,
        'test_cfg': TestLoop,
        'optim_wrapper': OptimWrapper,
        'log_processor': LogProcessor,
        'train_dataloader': DataLoader,
        'val_dataloader': DataLoader,
        'test_dataloader': DataLoader,
    }.items():
        node = cfg.get(key)
        if isinstance(node, dict) and 'type' not in node:
            yield key, node, kind
    for key, registries in REGISTRIES.items():
        yield from _typed_below(key, cfg.get(key), registries, None)


def _typed_below(
    place: str, node: object, registries: tuple[Registry, ...], scope: str | None
) -> Iterator[tuple[str, dict, object]]:
    if isinstance(node, (list, tuple)):
        for index, item in enumerate(node):
            yield from _typed_below(f'{place}.{index}', item, registries, scope)
    if not isinstance(node, dict):
        return
    scope = node.get('_scope_') or scope
    if 'type' in node:
        kind = class_of(node['type'], registries, scope)
        yield place, node, kind
        if kind is None:
            return  # what is below is its own
    for key, value in node.items():
        yield from _typed_below(f'{place}.{key}', value, registries, scope)


def class_of(name: object, registries: tuple[Registry, ...], scope: str | None) -> object:
    """The class or function of a type; None if it is not registered."""
    if not isinstance(name, str):
        return name if callable(name) else None
    for registry in registries:
        with registry.switch_scope_and_registry(scope) as scoped:
            found = scoped.get(name)
        if found is not None:
            if found.__module__ == 'acmix_mm.openmmlab':
                return found.stands_for()
            return found
    return None


def arguments_of(kind: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    """Arguments of a class, with those of its bases that it passes on; whether it takes others."""
    found: dict[str, inspect.Parameter] = {}
    functions = [kind]
    if inspect.isclass(kind):
        functions = [vars(c)['__init__'] for c in kind.__mro__[:-1] if '__init__' in vars(c)]
    takes_any = False
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
        if not takes_any:
            break
    found.pop('self', None)
    return found, takes_any


# What is taken from these before the class gets them.
TAKEN = {
    '*_hooks.*': {'priority'},
    'param_scheduler*': {'convert_to_iter_based', 'epoch_length'},
    'optim_wrapper': {'constructor', 'optimizer', 'paramwise_cfg'},
    'train_cfg': {'by_epoch'},
    '*_dataloader': {'num_batch_per_epoch', 'disable_subprocess_warning'},
}
# What has a registered type, by patterns of places; * stands for one name.
NEED_TYPE = [
    re.compile(pattern.replace('.', r'\.').replace('*', '[^.]+'))
    for pattern in (
        'model',
        '*_dataloader.dataset',
        '*_dataloader.sampler',
        '*_dataloader.dataset.pipeline.*',
        '*_hooks.*',
        '*_evaluator',
        '*_evaluator.[0-9]',
        'optim_wrapper.optimizer',
        'param_scheduler',
        'param_scheduler.[0-9]',
        'visualizer',
    )
]


def _check_arguments(place: str, node: dict, kind: object) -> None:
    if kind is None:
        if not any(pattern.fullmatch(place) for pattern in NEED_TYPE):
            return  # building tells, or it is of others, such as Albumentations
        raise ValueError(
            _unknown_type(f'{place}.type', node['type'], REGISTRIES[place.split('.')[0]])
        )
    arguments, takes_any = arguments_of(kind)
    taken = set().union(*(keys for pattern, keys in TAKEN.items() if fnmatch(place, pattern)))
    for key, value in node.items():
        if key in arguments:
            _check_type(f'{place}.{key}', arguments[key], value)
        elif key in taken | {'type', '_scope_'} or place.startswith('model'):
            continue
        elif not takes_any or difflib.get_close_matches(key, arguments, cutoff=0.85):
            raise ValueError(_unknown_argument(place, kind, key))


def _unknown_type(place: str, name: object, registries: tuple[Registry, ...]) -> str:
    names: list[str] = []
    for registry in registries:
        with registry.switch_scope_and_registry(None) as scoped:
            while scoped is not None:
                names += scoped.module_dict
                scoped = scoped.parent
    return f'{place}: no class {name!r} is registered for it{nearest(str(name), names)}'


def _unknown_argument(place: str, kind: Callable, key: str) -> str:
    names, _ = arguments_of(kind)
    advice = f'{nearest(key, names)}; it has {", ".join(names)}'
    return f'{place}.{key}: {kind.__name__} has no argument {key}{advice}'


def _check_type(place: str, parameter: inspect.Parameter, value: object) -> None:
    """Refuse texts in the place of numbers."""
    annotation = parameter.annotation
    allowed = set(typing.get_args(annotation)) or {annotation}
    if annotation is parameter.empty and parameter.default is not parameter.empty:
        allowed = {type(parameter.default)}
        if not allowed <= NUMBERS:
            return
    elif not allowed <= NUMBERS | {str, type(None)}:
        return
    if isinstance(value, str) and str not in allowed:
        raise ValueError(f'{place} must be a number, got {value!r}')


class _WithoutValues(TorchFunctionMode):
    """Leaves tensors as they are allocated that would be filled with random numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', None) == 'torch.nn.init':
            return kwargs['tensor']
        if function in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return args[0]
        return function(*args, **(kwargs or {}))


def _build_parts(cfg: Config) -> None:
    if cfg.get('model') is not None:
        with torch.random.fork_rng(devices=[]), _WithoutValues():
            model = _build('model', MODELS, cfg.model)
        if model is not None:
            _check_channels(cfg.model, model)
    for place, node, _ in _typed(cfg):
        if re.search(r'pipeline\.\d+$', place):
            _build(place, TRANSFORMS, node)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1, momentum=0.5)
    for place, node, _ in _typed(cfg):
        if fnmatch(place, 'optim_wrapper*.optimizer'):
            _build(place, OPTIMIZERS, node, params=[nn.Parameter(torch.zeros(1))])
        elif place.startswith('param_scheduler'):
            loop = cfg.get('train_cfg') or {}
            end = loop.get('max_epochs', loop.get('max_iters', 1))
            _build(place, PARAM_SCHEDULERS, node, optimizer=optimizer, end=end, epoch_length=1)


def _build(place: str, registry: Registry, config: dict, **defaults) -> object:
    config = copy.deepcopy(config)
    places = {id(node): name for name, node in settings_of(config, place)}
    places[id(config)] = place
    try:
        return registry.build(config, default_args=defaults)
    except Exception as error:  # of classes of others, which may raise anything
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == 'build_from_cfg':
                node, kind = frame.f_locals['cfg'], frame.f_locals.get('obj_cls')
                place = places.get(id(node), place)
        if 'process group' in str(error):
            return None  # it will be there in a distributed job
        raise ValueError(_explain(error, place, node, kind)) from error


def _explain(error: Exception, place: str, node: dict, kind: object) -> str:
    registries = REGISTRIES[place.split('.')[0]]
    text = reason(error)
    found = re.search(r"unexpected keyword argument '(\w+)'", text)
    if found and kind is not None and found[1] in node:
        return _unknown_argument(place, kind, found[1])
    if isinstance(error, KeyError) and 'registry' in text:
        for name, value in settings_of(node, place):
            if name.endswith('.type') and class_of(value, registries, node.get('_scope_')) is None:
                return _unknown_type(name, value, registries)
    return f'{place}: {getattr(kind, "__name__", "")}: {text}'


SIDE = 128  # of the image by which channels are checked


@torch.no_grad()
def _check_channels(cfg: dict, model: nn.Module) -> None:
    """Run what stands on a backbone on its maps, and compare channels where it cannot.

    On tensors without data, and as far as that goes: networks that cannot do with those pass.
    """
    if not isinstance(getattr(model, 'backbone', None), nn.Module) or 'backbone' not in cfg:
        return
    model.to('meta').eval()
    channels = cfg['backbone'].get('in_channels', 3)
    source, maps = 'backbone', []
    with contextlib.suppress(Exception):
        maps = _as_maps(model.backbone(torch.empty(1, channels, SIDE, SIDE, device='meta')))
    for place, part, node in _followers(cfg, model):
        if not maps:
            return
        out = None
        try:
            out = part(maps)
        except Exception as error:
            problem = _other_channels(part, node, maps, error)
            if problem:
                kind = type(getattr(model, source)).__name__
                raise ValueError(
                    f'model.{place}.in_channels {problem}, but model.{source} ({kind}) gives '
                    f'{_described(maps)}'
                ) from error
        if part is getattr(model, 'neck', None):
            source, maps = 'neck', _as_maps(out)


def _followers(cfg: dict, model: nn.Module) -> Iterator[tuple[str, nn.Module, dict]]:
    """What takes maps: place, module and config of the neck, then of each head."""
    for key in ('neck', 'rpn_head', 'panoptic_head', *HEADS):
        part, node = getattr(model, key, None), cfg.get(key)
        if isinstance(part, nn.ModuleList) and isinstance(node, (list, tuple)):
            for index, pair in enumerate(zip(part, node, strict=False)):
                yield f'{key}.{index}', *pair
        elif isinstance(part, nn.Module) and node:
            yield (key, part, node) if isinstance(node, dict) else (f'{key}.0', part, node[0])


def _as_maps(out: object) -> list[torch.Tensor]:
    out = [out] if isinstance(out, torch.Tensor) else out
    whole = isinstance(out, (list, tuple)) and all(isinstance(m, torch.Tensor) for m in out)
    return list(out) if whole else []


def _described(maps: list[torch.Tensor]) -> str:
    channels = [m.size(1) for m in maps]
    strides = ', '.join(str(round(SIDE / m.size(-1))) for m in maps if m.ndim == 4)
    return f'{len(maps)} maps with {channels} channels' + (f' at strides {strides}' * bool(strides))


def _other_channels(
    part: nn.Module, node: dict, maps: list[torch.Tensor], error: Exception
) -> str | None:
    """How ``in_channels`` differs from the channels of the maps, None if it does not."""
    expected, given = node.get('in_channels'), [m.size(1) for m in maps]
    index = getattr(part, 'in_index', None)
    if index is not None:  # of segmentors' heads: which maps they take
        indices = index if isinstance(index, (list, tuple)) else [index]
        if not all(-len(maps) <= i < len(maps) for i in indices):
            return f'is {expected} of in_index {index}'
        given = [given[i] for i in indices]
    if isinstance(expected, (list, tuple)):
        # Some count from the last one.
        differs = sorted(expected) != sorted(given)
    else:
        called = not isinstance(error, TypeError)  # else it takes more than maps
        differs = isinstance(expected, int) and called and expected not in given
    of_index = '' if index is None else f' of in_index {index}'
    return f'is {expected}{of_index}' if differs else None


def _check_classes(cfg: Config) -> None:
    """Compare the classes of heads with those of the data sets, where the config says both."""
    for place, value in head_classes(cfg.get('model') or {}):
        for data, names in data_classes(cfg).items():
            if value != len(names):
                raise ValueError(f'{place} is {value}, but {data} has {len(names)} classes')


def data_classes(cfg: Config) -> dict[str, tuple[str, ...]]:
    """The classes of a config's data sets by dotted names, of those where the config says them."""
    classes = {}
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for place, node, kind in _typed_below(key, cfg.get(key), (DATASETS,), None):
            if re.search(r'\.datasets?(\.\d+)?$', place):
                names = (node.get('metainfo') or {}).get('classes')
                if names is None:
                    names = getattr(kind, 'METAINFO', {}).get('classes')
                if isinstance(names, (list, tuple)):
                    classes[place] = tuple(names)
    return classes


def head_classes(model: dict, place: str = 'model') -> Iterator[tuple[str, int]]:
    """The number of classes of each head of a model's config, with its dotted name."""
    for key, value in model.items():
        for number, part in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(part, dict):
                at = f'{place}.{key}' if part is value else f'{place}.{key}.{number}'
                count = part.get('num_classes')
                # A segmentor's head with one output for two classes has a count of its own.
                if key in HEADS and isinstance(count, int) and part.get('out_channels') != 1:
                    yield f'{at}.num_classes', count
                elif 'num_things_classes' in part:  # of a head for instances and surroundings
                    count = part['num_things_classes'] + part.get('num_stuff_classes', 0)
                    yield f'{at}.num_things_classes with num_stuff_classes', count
                yield from head_classes(part, at)
