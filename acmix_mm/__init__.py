"""ACmix ("On the Integration of Self-Attention and Convolution", CVPR 2022).

``acmix_mm.ops`` and ``acmix_mm.layers`` need torch alone. Where OpenMMLab is installed, importing
the package registers its backbones and layers in ``mmengine.registry.MODELS``; configs do so with
``custom_imports = dict(imports=['acmix_mm'])``.
"""

import importlib

from . import layers, ops
from .models import deploy, set_backend
from .onnx_export import export_onnx
from .openmmlab import connect
from .version import __version__

__all__ = ['__version__', 'backbones', 'deploy', 'export_onnx', 'layers', 'ops', 'set_backend']

connect()


def __getattr__(name: str):
    """``acmix_mm.backbones``, imported when it is asked for: it needs mmdet."""
    if name == 'backbones':
        return importlib.import_module('.backbones', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
