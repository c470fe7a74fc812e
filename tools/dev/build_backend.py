"""Setuptools as the build backend (PEP 517), with the PyTorch that the native kernels are for.

An isolated build does not see the environment that it installs into. PyTorch is imported from there
all the same, as a library compiled for another one does not load; where there is none, the build
requires one, as the package does.
"""

import site
import sys

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403


def find_torch() -> bool:
    """Import PyTorch, for setup.py, from the build's environment or the one installed into."""
    path = sys.path[:]
    sys.path += site.getsitepackages()
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return False
    finally:
        sys.path[:] = path  # plug-ins of setuptools that are there stay out
    return True


TORCH = [] if find_torch() else ['torch>=2.4']


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + TORCH


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + TORCH
