"""Installation of acmix_mm; exact tested versions are in constraints*.txt."""

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / 'acmix_mm' / 'version.py').read_text(), VERSION)

SOURCES = 'acmix_mm/ops/csrc'
KERNELS = ('group_conv', 'local_aggregation', 'local_attention', 'patch_weights', 'processor')
REASON_FILE = 'acmix_mm/ops/native_build.txt'  # read by acmix_mm/ops/backends/native_backend.py
WARNING = """
acmix_mm: the native CPU kernels were NOT built: {}
acmix_mm works without them, with slower operators on the CPU. To have them, install with a C++
compiler, beside the torch to be used.
"""


def note(reason: str | None, folder: str) -> None:
    """Keep beside the package why its kernels are missing, or nothing where they are not."""
    file = Path(folder, REASON_FILE)
    file.unlink(missing_ok=True)
    if reason is not None:
        print(WARNING.format(reason), file=sys.stderr)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(reason)


class BuildWithMim(build_py):
    """Puts configs and programs where OpenMMLab looks for those of a package: in ``.mim``.

    Only into what is built: an editable installation has them beside the package.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        mim = Path(self.build_lib, 'acmix_mm', '.mim')
        shutil.rmtree(mim, ignore_errors=True)  # of an earlier build
        left_out = shutil.ignore_patterns('__pycache__', 'dev')
        for folder in ('configs', 'tools'):
            shutil.copytree(ROOT / folder, mim / folder, ignore=left_out)
        for file in ('model-index.yml', 'README.md'):
            shutil.copy2(ROOT / file, mim)


def native_kernels() -> dict:
    """Arguments of setup() that build the native CPU kernels, or keep why there are none."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        reason = f'{type(error).__name__}: {error}'

        class WithoutKernels(BuildWithMim):
            def run(self) -> None:
                super().run()
                note(reason, '' if self.editable_mode else self.build_lib)

        return {'cmdclass': {'build_py': WithoutKernels}}

    class OptionalBuild(BuildExtension):
        """A failed build, for example without a compiler, leaves the package usable."""

        def run(self) -> None:
            reason = None
            try:
                super().run()
            except Exception as error:
                reason = ' '.join(f'{type(error).__name__}: {error}'.split())
                self.extensions.clear()
            note(reason, '' if self.inplace else self.build_lib)

    extension = CppExtension(
        'acmix_mm.ops._native',
        [f'{SOURCES}/{name}.cpp' for name in KERNELS],
        depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / SOURCES).glob('*.h')),
        # Without OpenMP, at::parallel_for runs serially. Debug information would take more than a
        # third of the compiler's time.
        extra_compile_args=['-O3', '-fopenmp', '-g0'],
    )
    return {
        'ext_modules': [extension],
        'cmdclass': {'build_py': BuildWithMim, 'build_ext': OptionalBuild},
    }


setup(
    name='acmix-mm',
    version=VERSION['__version__'],
    description='ACmix backbones and operators for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    project_urls={'Paper': 'https://arxiv.org/abs/2111.14556'},
    keywords=[
        'computer vision',
        'object detection',
        'instance segmentation',
        'semantic segmentation',
        'self-attention',
        'convolution',
        'ACmix',
        'OpenMMLab',
        'PyTorch',
    ],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: C++',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    **native_kernels(),
    packages=find_packages(include=['acmix_mm', 'acmix_mm.*']),
    package_data={'acmix_mm': ['py.typed', 'analysis/*.html']},
    python_requires='>=3.10',
    # All that acmix_mm.ops and acmix_mm.layers need; backbones and programs need one of the first
    # two extras.
    install_requires=['torch>=2.4'],
    extras_require={
        # One of the two families that provide mmcv, mmengine, mmdet and mmseg.
        'onedl': [
            'onedl-mmcv>=2.3.6',
            'onedl-mmengine>=0.10.12',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmsegmentation>=1.4.2',
            'packaging',
        ],
        'openmmlab': [
            'mmcv>=2.1.0,<2.2.0',
            'mmengine>=0.10.7',
            'mmdet>=3.3.0',
            'mmsegmentation>=1.2.2',
            'packaging',
            'ftfy',
            'regex',
            'setuptools<80',  # mmengine imports its pkg_resources
        ],
        # Image classifiers (configs/imagenet), beside one of the two families.
        'classification': ['onedl-mmpretrain>=1.3.6'],
        'classification-openmmlab': ['mmpretrain>=1.2.0'],
        # The data set scene digits.
        'demo': ['scikit-image', 'scikit-learn', 'tqdm'],
        # tools/model_converters/export_onnx.py.
        'onnx': ['onnx', 'onnxscript', 'onnxruntime'],
        # tools/train.py --tensorboard.
        'tensorboard': ['tensorboard'],
        # make docs, and executing the notebook.
        'docs': (ROOT / 'docs' / 'requirements.txt').read_text().split(),
        # PyTorch for CUDA brings Triton along; with the CPU build, the tests interpret its kernels.
        'dev': [
            'pytest',
            'pytest-xdist',
            'hypothesis',
            'ruff',
            "triton; platform_system == 'Linux'",
        ],
    },
)
