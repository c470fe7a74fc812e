"""ACmix ("On the Integration of Self-Attention and Convolution", CVPR 2022) for OpenMMLab.

Importing the package registers its backbones and layers in ``mmengine.registry.MODELS``; configs do
so with ``custom_imports = dict(imports=['acmix_mm'])``.
"""

from ._mmengine_flops import register_flop_formulas
from ._requirements import check_requirements, make_checkpoints_loadable
from .version import __version__

check_requirements()
make_checkpoints_loadable()

from . import backbones, layers, ops  # noqa: E402

register_flop_formulas()

__all__ = ['__version__', 'backbones', 'layers', 'ops']
