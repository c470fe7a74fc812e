"""Tools of MMDetection, MMSegmentation and MMPretrain, where they lie in the installed packages.

    python -m acmix_mm.upstream PACKAGE TOOL [arguments of the tool]

PACKAGE is mmdet, mmseg or mmpretrain, TOOL a program below its tools, such as
analysis_tools/eval_metric; without TOOL, all are listed. acmix_mm is imported before, so that
configs can inherit ``mmseg::...``, mmpretrain does without torchvision, and checkpoints that
training wrote load. docs/upstream_tools.md says what works.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

from .checkpoints import make_checkpoints_loadable

PACKAGES = ('mmdet', 'mmseg', 'mmpretrain')


def tools_of(package: str) -> dict[str, Path]:
    """The files of an installed package's tools by their paths without suffix.

    Raises:
        ValueError: If the package is none of OpenMMLab's three, not installed or has no tools.
    """
    if package not in PACKAGES:
        raise ValueError(f'PACKAGE must be one of {", ".join(PACKAGES)}, got {package!r}')
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ValueError(f'PACKAGE {package} is not installed')
    folder = Path(spec.submodule_search_locations[0], '.mim', 'tools')
    if not folder.is_dir():
        raise ValueError(f'PACKAGE {package} has no folder {folder}')
    files = sorted(folder.rglob('*.py'))
    return {file.relative_to(folder).with_suffix('').as_posix(): file for file in files}


def mend_matplotlib() -> None:
    """Let mmpretrain's browse_dataset call what asks for a renderer in matplotlib 3.11."""
    from matplotlib import _tight_bbox

    adjust = _tight_bbox.adjust_bbox

    def adjust_bbox(figure, bbox, renderer=None, *args):
        return adjust(figure, bbox, renderer or figure.canvas.get_renderer(), *args)

    _tight_bbox.adjust_bbox = adjust_bbox


def main(argv: list[str]) -> None:
    """Run a tool, or list them.

    Args:
        argv (list[str]): See the module.
    """
    if not argv or argv[0] in ('-h', '--help'):
        print(__doc__)
        return
    package, *rest = argv
    try:
        tools = tools_of(package)
    except ValueError as error:
        sys.exit(f'error: {error}')
    if not rest:
        print(*tools, sep='\n')
        return
    name = rest[0].removesuffix('.py')
    if name not in tools:
        sys.exit(
            f'error: {package} has no tool {rest[0]!r}; python -m acmix_mm.upstream {package} '
            'lists those that it has'
        )
    make_checkpoints_loadable()
    mend_matplotlib()
    sys.argv = [str(tools[name]), *rest[1:]]
    sys.path[0] = str(tools[name].parent)  # as if Python had been started with it
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main(sys.argv[1:])
