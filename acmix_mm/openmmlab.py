"""All that is done to OpenMMLab, none of which is needed by ``acmix_mm.ops`` and ``.layers``.

Requirements, registration, known faults mended. Two families provide the packages under the same
import names: OneDL (``onedl-*``, maintained, tested) and the original OpenMMLab packages. Versions
are those that were tried.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

BACKBONES = (
    'ACmixPyramidVisionTransformer',
    'ACmixResNet',
    'ACmixSAN',
    'ACmixSwinTransformer',
    'DWNet',
    'SAN',
    'XVolutionResNet',
)
TRAINING_HOOKS = (
    'PacedLoggerHook',
    'PathBiasHook',
    'PreemptionHook',
    'ReproducibilityHook',
    'SafeCheckpointHook',
    'StopAtNonFiniteLossHook',
    'SummaryHook',
)


class _Watch(importlib.abc.MetaPathFinder):
    """Calls a function once, when a module has been imported."""

    def __init__(self, module: str, action: Callable[[], None]):
        self.module = module
        self.action = action
        self.searching = False

    def find_spec(self, name: str, path=None, target=None):
        if name != self.module or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module) -> None:
                execute(module)
                # Not before: who asks for a spec need not import the module.
                sys.meta_path.remove(self)
                self.action()

            spec.loader.exec_module = execute_and_act
        return spec


def connect() -> None:
    """Have mmengine know the package's models, and what its operators cost, once it is loaded.

    So importing ``acmix_mm`` loads nothing of OpenMMLab. What is registered for a backbone imports
    it when it is built, see :func:`check_requirements` for what that needs.
    """
    for module, action in (
        ('mmengine.registry', register),
        ('mmengine.config.utils', find_packages_by_module),
        ('mmengine.config.config', find_own_configs),
        ('mmengine.analysis.complexity_analysis', register_flop_formulas),
        ('mmengine.dataset.base_dataset', name_samples),
        ('mmpretrain', spare_torchvision),
    ):
        if sys.modules.get(module) is not None:
            action()
        else:
            sys.meta_path.insert(0, _Watch(module, action))


def register() -> None:
    """Register layers, backbones and what training takes in mmengine's root registries.

    The one place where this happens. Called again by ``acmix_mm.backbones``, it puts the classes
    in the place of the functions that import them. As layer types, layers leave some convolutions
    what they are, see :func:`_layer_type`.
    """
    from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS, VISUALIZERS

    from .layers import ACmix, LastMapPooling, XVolution

    backbones = sys.modules.get('acmix_mm.backbones')
    entries = {layer.__name__: _layer_type(layer) for layer in (ACmix, XVolution)}
    entries['LastMapPooling'] = LastMapPooling
    entries |= {
        name: getattr(backbones, name, None) or _imported('acmix_mm.backbones', name)
        for name in BACKBONES
    }
    for name, entry in entries.items():
        taken = MODELS.module_dict.get(name)
        ours = taken is not None and taken.__module__.startswith('acmix_mm.')
        MODELS.register_module(name=name, module=entry, force=ours)
    for name in TRAINING_HOOKS:
        HOOKS.register_module(name=name, module=_imported('acmix_mm.engine', name), force=True)
    name = 'CPUAmpOptimWrapper'
    OPTIM_WRAPPERS.register_module(name=name, module=_imported('acmix_mm.engine', name), force=True)
    name = 'SegmentationVisualizer'
    module = _imported('acmix_mm.segmentation_pictures', name)
    VISUALIZERS.register_module(name=name, module=module, force=True)


def find_packages_by_module() -> None:
    """Let configs inherit ``mmseg::...`` under OneDL, too.

    mmengine looks for a package of each scope's name, mmsegmentation for mmseg; OneDL's has another
    name. Scopes whose package is missing are looked for by their module.
    """
    from mmengine.config.utils import MODULE2PACKAGE
    from mmengine.utils import is_installed

    for module, package in MODULE2PACKAGE.items():
        if not is_installed(package) and importlib.util.find_spec(module) is not None:
            MODULE2PACKAGE[module] = module


def find_own_configs() -> None:
    """Let configs inherit ``acmix_mm::...``, which mmengine knows of its own packages only.

    From the folder ``.mim`` of an installed package, or from the clone around it. What is inherited
    stays without a scope: these configs set the default scope that their types are of.
    """
    from mmengine.config.config import Config  # mmengine.config is being imported
    from mmengine.utils import check_file_exist

    find = Config._get_cfg_path

    @functools.wraps(find)
    def find_config(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, name = cfg_path.partition('::')
        if not separator or package != __package__:
            return find(cfg_path, filename)
        root = Path(__file__).parent
        folder = root / '.mim' if (root / '.mim').is_dir() else root.parent
        path = str(folder / 'configs' / name)
        check_file_exist(path)
        return path, None

    Config._get_cfg_path = staticmethod(find_config)


def _imported(module: str, name: str) -> Callable:
    """Builds what a module has under a name, and imports it only then, or by ``stands_for()``."""

    def stands_for() -> Callable:
        return getattr(importlib.import_module(module), name)

    def build(*args, **kwargs):
        found = stands_for()
        # mmengine keeps instances of some classes by their names.
        return getattr(found, 'get_instance', found)(*args, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.stands_for = stands_for
    return build


# A layer that is wider than this is none of images, with colours, depth or opacity.
IMAGE_CHANNELS = 4


def _layer_type(layer: type[nn.Module]) -> Callable[..., nn.Module]:
    """What ``conv_cfg=dict(type=...)`` builds: the layer, or a plain convolution.

    A ``conv_cfg`` reaches all convolutions of a module. The layer takes the place of those that
    look at a neighbourhood of a map: square and same-padded, of 3 pixels a side or more. All others
    are built as ``nn.Conv2d``, without those arguments that the layer alone has: 1x1 ones, such as
    the lateral ones of an FPN, unless ``replace_1x1=True`` is given, those of the image, such as
    stems, depth-wise ones, and those of another geometry, such as patch embeddings.

    With ``deploy=True`` the layer is built in its form for inference, for checkpoints of that form.
    """
    arguments, plain = (list(inspect.signature(c).parameters) for c in (layer, nn.Conv2d))

    @functools.wraps(layer, updated=())
    def build(
        in_channels, out_channels, kernel_size=3, *args, replace_1x1=False, deploy=False, **kwargs
    ):
        kwargs |= zip(plain[3:], args, strict=False)
        least = 1 if replace_1x1 else 3
        if _is_replaced(in_channels, kernel_size, least, **kwargs):
            built = layer(in_channels, out_channels, kernel_size, **kwargs)
            if deploy:
                built.switch_to_deploy()
            return built
        kwargs = {k: v for k, v in kwargs.items() if k in plain or k not in arguments}
        return nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)

    signature = inspect.signature(layer)
    flag = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=False)
    parameters = [*signature.parameters.values(), flag('replace_1x1'), flag('deploy')]
    build.__signature__ = signature.replace(parameters=parameters)
    return build


def _is_replaced(
    in_channels: int,
    kernel_size: int | Sequence[int],
    least: int,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 'same',
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    **kwargs,
) -> bool:
    """Whether a layer type takes the place of such a convolution, see :func:`_layer_type`."""
    if padding != 'same' and isinstance(padding, str):
        return False
    geometry = (kernel_size, stride, dilation, 0 if padding == 'same' else padding)
    sides = [{*value} if isinstance(value, (tuple, list)) else {value} for value in geometry]
    if any(len(side) > 1 for side in sides):
        return False
    (kernel,), _, (dilation,), (pad,) = sides
    same = padding == 'same' or pad == dilation * (kernel // 2)
    of_maps = in_channels > IMAGE_CHANNELS and not 1 < groups == in_channels
    return kernel % 2 == 1 and kernel >= least and same and of_maps


def register_flop_formulas() -> None:
    """Give mmengine's counter, which get_flops.py of mmdet and mmseg calls, PyTorch's formulas.

    Halved: a multiplication with its addition is one FLOP there. Formulas are those of our
    operators, see :mod:`acmix_mm.ops._flops`, and of products that mmengine leaves out; its own
    stay, of products and, what PyTorch does not count, of norms, pooling and interpolation.
    """
    from mmengine.analysis.complexity_analysis import _DEFAULT_SUPPORTED_FLOP_OPS as handles

    aten = torch.ops.aten
    tensors = slice(3)  # the arguments that the formula takes
    attention = _handle(aten._scaled_dot_product_flash_attention, tensors)
    handles.setdefault('aten::scaled_dot_product_attention', attention)
    handles.setdefault('aten::baddbmm', _handle(aten.baddbmm, tensors))
    for operator in flop_registry:
        if str(operator).startswith('acmix_mm.'):
            handles.setdefault(operator._qualified_op_name, _handle(operator))


def _handle(
    operator: torch._ops.OpOverloadPacket, arguments: slice = slice(None)
) -> Callable[[list, list], int]:
    """The operator's formula for a node of a traced graph."""
    formula = flop_registry[operator]

    def flops(inputs: list, outputs: list) -> int:
        shapes = [_shape(value) for value in outputs]
        out = shapes[0] if len(shapes) == 1 else tuple(shapes)
        return formula(*map(_shape, inputs[arguments]), out_val=out) // 2

    return flops


def _shape(value: torch.Value):
    """The shape of a tensor, other constants as they are; None for what the graph computes."""
    return value.type().sizes() if value.isCompleteTensor() else value.toIValue()


def name_samples() -> None:
    """Have errors of data sets' pipelines name the sample's files; few of them do by themselves."""
    from mmengine.dataset.base_dataset import BaseDataset

    prepare = BaseDataset.prepare_data

    @functools.wraps(prepare)
    def prepare_data(self, idx):
        try:
            return prepare(self, idx)
        except Exception as error:
            info = self.get_data_info(idx)
            files = [info[key] for key in ('img_path', 'seg_map_path') if info.get(key)]
            sample = ' and '.join(files) or f'sample {idx}'
            raise RuntimeError(f'{sample}: {type(error).__name__}: {error}') from error

    BaseDataset.prepare_data = prepare_data


class _Absent(ModuleType):
    """Stands for a module that is not installed: what is taken from it raises when called."""

    def __getattr__(self, name: str) -> type:
        if name.startswith('__'):
            raise AttributeError(name)

        def refuse(*args, **kwargs):
            raise ImportError(f'{self.__name__}.{name} is needed, but torchvision is not installed')

        return type(name, (), {'__new__': refuse})


@contextlib.contextmanager
def _absent_torchvision() -> Iterator[None]:
    """Let ``import torchvision`` succeed, with nothing in it, where it is not installed."""
    names = ['torchvision', 'torchvision.ops', 'torchvision.ops.boxes', 'torchvision.transforms']
    names += ['torchvision.transforms.functional', 'torchvision.transforms.transforms']
    sys.modules.update({name: _Absent(name) for name in names})
    for name in names[1:]:
        parent, _, child = name.rpartition('.')
        setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def spare_torchvision() -> None:
    """Import mmpretrain's parts so that they do without torchvision where it is not installed.

    They import it for a few transforms and box functions, which image classifiers do not use, but
    mmpretrain does not require it, and there is none beside torch's CPU build from PyPI.
    """
    if importlib.util.find_spec('torchvision') is None:
        # A line of theirs that is meant for debugging is printed in any case.
        with _absent_torchvision(), contextlib.redirect_stdout(io.StringIO()):
            for part in ('datasets', 'evaluation', 'models'):
                importlib.import_module(f'mmpretrain.{part}')


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
    """Import what the backbones need.

    Raises:
        ImportError: If one is missing, too old or does not load; the message names it, what was
            found, and the command that installs it.
    """
    from packaging.version import Version

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
