"""Install acmix_mm and everything it needs, in tested versions, into the running Python.

Made for ``make``: run it with the virtual environment's own Python. Standard library only. Which of
the two families of OpenMMLab packages is installed is a choice; it has the versions of
constraints-FAMILY.txt. The one long step is compiling mmcv's operators, about four minutes on two
cores; pip keeps the result, so that later environments of the same machine get it in seconds.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRESS_SECONDS = 15
# The distribution that has mmcv, and the extras of acmix_mm that have the rest.
FAMILIES = {
    'onedl': ('onedl-mmcv', 'onedl,classification'),
    'openmmlab': ('mmcv', 'openmmlab,classification-openmmlab'),
}


def pip(
    family: str, *arguments: str, env: dict[str, str] | None = None, log: Path | None = None
) -> bool:
    """Install the pinned versions; with ``log``, show that a long build is alive and may fail."""
    command = [sys.executable, '-m', 'pip', 'install', '--disable-pip-version-check']
    # Bytecode is written where a module is first imported: all of it at once takes a while.
    constraints = ROOT / f'constraints-{family}.txt'
    command += ['--no-compile', '--constraint', str(constraints), *arguments]
    # Settings of a surrounding environment must not send packages elsewhere.
    for name in ('PYTHONPATH', 'PYTHONHOME', 'PIP_TARGET', 'PIP_PREFIX', 'PIP_USER'):
        os.environ.pop(name, None)
    # PyTorch compiles files in parallel only if it finds the command ninja.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', os.defpath)])
    env = {**os.environ, 'PATH': path, 'PYTHONNOUSERSITE': '1', **(env or {})}
    if log is None:
        code = subprocess.run([*command, '--quiet'], env=env).returncode
    else:
        return logged(command, env, log) == 0
    if code:
        sys.exit(f'error: pip failed: {" ".join(arguments)}')
    return True


def logged(command: list[str], env: dict[str, str], log: Path) -> int:
    """Run with output to ``log``, printing how far the compiler is every few seconds."""
    start = time.monotonic()
    with log.open('w') as output:
        process = subprocess.Popen(
            [*command, '--verbose'], env=env, stdout=output, stderr=subprocess.STDOUT
        )
        while True:
            try:
                return process.wait(timeout=PROGRESS_SECONDS)
            except subprocess.TimeoutExpired:
                steps = re.findall(r'\[(\d+)/(\d+)\]', log.read_text(errors='replace'))
                done = f'{steps[-1][0]} of {steps[-1][1]} files compiled' if steps else 'preparing'
                minutes, seconds = divmod(int(time.monotonic() - start), 60)
                print(f'    {minutes}:{seconds:02d}  {done}', flush=True)


def imports(module: str) -> bool:
    return (
        subprocess.run(
            [sys.executable, '-c', f'import {module}'], capture_output=True, cwd=ROOT
        ).returncode
        == 0
    )


def fast_compiler(folder: str) -> dict[str, str]:
    """Settings that make cxx.py the compiler, by a command in ``folder``: no spaces in its path."""
    command = Path(folder) / 'c++'
    script = shlex.join([sys.executable, '-I', '-S', str(ROOT / 'tools/dev/cxx.py')])
    command.write_text(f'#!/bin/sh\nexec {script} "$@"\n')
    command.chmod(0o755)
    compiler = os.environ.get('CXX', '')
    return {'CXX': str(command), 'ACMIX_CXX': compiler, 'ACMIX_CXX_FOLDER': folder}


def install_mmcv(family: str) -> None:
    """Build mmcv with its operators, against the torch that is installed."""
    log = Path(sys.prefix) / 'mmcv-build.log'
    mmcv, _ = FAMILIES[family]

    def build(*options: str, compiler: dict[str, str]) -> bool:
        arguments = [*options, '--no-build-isolation', mmcv]
        return pip(family, *arguments, env={'MMCV_WITH_OPS': '1', **compiler}, log=log)

    options: tuple[str, ...] = ()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        fast = fast_compiler(folder)
        built = build(compiler=fast)
        if built and not imports('mmcv.ops'):
            # pip's cache may hold a wheel built without operators or for another torch.
            print('    cached build does not fit this torch, compiling anew', flush=True)
            options = ('--no-cache-dir', '--force-reinstall', '--no-deps')
            built = build(*options, compiler=fast)
    if not built:
        print('    once more, with the plain compiler', flush=True)
        if not build(*options, compiler={}):
            sys.exit(f'error: pip could not install {mmcv} (see {log})')
    if not imports('mmcv.ops'):
        sys.exit(f'error: mmcv was built, but mmcv.ops does not import (see {log})')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--family',
        choices=list(FAMILIES),
        default='onedl',
        help="OneDL's maintained packages (default) or the original ones",
    )
    family = parser.parse_args().family
    if sys.prefix == sys.base_prefix:
        sys.exit('error: run this with the Python of a virtual environment, as "make setup" does')
    print('[1/3] torch and build tools', flush=True)
    pip(family, 'torch', 'numpy', 'ninja', 'psutil', 'setuptools', 'wheel')
    print(
        '[2/3] mmcv with compiled operators: about 4 minutes on 2 cores the first time, '
        "seconds from pip's cache",
        flush=True,
    )
    install_mmcv(family)
    print('[3/3] the other packages and acmix_mm', flush=True)
    _, extras = FAMILIES[family]
    pip(family, '--no-build-isolation', '--editable', f'{ROOT}[{extras},demo,onnx,tensorboard,dev]')
    check = 'import acmix_mm; print("acmix_mm", acmix_mm.__version__, "is ready")'
    sys.exit(subprocess.run([sys.executable, '-c', check], cwd=Path(sys.prefix)).returncode)


if __name__ == '__main__':
    main()
