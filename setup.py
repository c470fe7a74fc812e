"""Installation of acmix_mm; exact tested versions are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / 'acmix_mm' / 'version.py').read_text(), VERSION)

setup(
    name='acmix-mm',
    version=VERSION['__version__'],
    description='ACmix backbones and operators for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['acmix_mm', 'acmix_mm.*']),
    python_requires='>=3.10',
    install_requires=['torch>=2.4', 'packaging'],
    extras_require={
        # One of the two families that provide mmcv, mmengine, mmdet and mmseg.
        'onedl': [
            'onedl-mmcv>=2.3.6',
            'onedl-mmengine>=0.10.12',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmsegmentation>=1.4.2',
        ],
        'openmmlab': [
            'mmcv>=2.1.0,<2.2.0',
            'mmengine>=0.10.7',
            'mmdet>=3.3.0',
            'mmsegmentation>=1.2.2',
            'ftfy',
            'regex',
        ],
        # The data set scene digits.
        'demo': ['scikit-image', 'scikit-learn', 'tqdm'],
        'dev': ['pytest', 'hypothesis', 'ruff'],
    },
)
