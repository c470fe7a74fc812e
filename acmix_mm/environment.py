"""What an installation and a machine are, for reports; needs PyTorch alone."""

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from .ops import available_backends
from .ops._dispatch import BACKEND_VARIABLE, BACKENDS, why_missing
from .version import __version__

OPENMMLAB = ('mmcv', 'mmengine', 'mmdet', 'mmseg', 'mmpretrain')
VARIABLES = (
    BACKEND_VARIABLE,
    'ATEN_CPU_CAPABILITY',
    'CUDA_VISIBLE_DEVICES',
    'OMP_NUM_THREADS',
    'TRITON_INTERPRET',
)


def accelerators() -> list[str]:
    """Types of the accelerators that PyTorch can use here, such as ['cuda']."""
    modules = {kind: getattr(torch, kind, None) for kind in ('cuda', 'xpu', 'mps')}
    # torch.mps has no is_available() before PyTorch 2.6.
    modules['mps'] = torch.backends.mps
    return [kind for kind, module in modules.items() if module and module.is_available()]


def device_name(device: str) -> str:
    """Name of a processor or an accelerator as its maker calls it, where that is known."""
    kind = torch.device(device).type
    if kind in ('cuda', 'xpu'):
        return getattr(torch, kind).get_device_name(device)
    if kind == 'cpu':
        with contextlib.suppress(OSError):
            info = Path('/proc/cpuinfo').read_text()
            match = re.search(r'^model name\s*: (.+)$', info, re.MULTILINE)
            if match:
                return match[1]
    return kind.upper()


def environment() -> dict[str, str]:
    """Versions, processors, accelerators, and for each backend whether it is there or why not."""
    builds = [f'{name} {v}' for name in ('cuda', 'hip', 'xpu') if (v := _version_of_build(name))]
    threads = f'{torch.get_num_threads()} threads, {os.cpu_count()} cores'
    entries = {
        'acmix_mm': f'{__version__}, {Path(__file__).parent}',
        'python': f'{platform.python_version()}, {platform.platform()}',
        'torch': f'{torch.__version__}, built for {", ".join(builds) or "CPUs"}',
        'triton': _version('triton'),
        'openmmlab': ', '.join(f'{name} {_version(name)}' for name in OPENMMLAB),
        'cpu': f'{device_name("cpu")}, {threads}, {torch.backends.cpu.get_cpu_capability()}',
        'accelerators': ', '.join(f'{k} ({device_name(k)})' for k in accelerators()) or 'none',
    }
    available = available_backends()
    for backend in BACKENDS:
        state = 'available' if backend in available else f'not available: {why_missing(backend)}'
        entries[f'backend {backend}'] = state
    entries |= {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    return entries


def _version_of_build(name: str) -> str | None:
    return getattr(torch.version, name, None)


def _version(module: str) -> str:
    """Version of the distribution that provides a module, with its name if that is another."""
    found = importlib.metadata.packages_distributions().get(module)
    if not found:
        return 'not installed'
    version = importlib.metadata.version(found[0])
    return version if found[0] == module else f'{version} ({found[0]})'
