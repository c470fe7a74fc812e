"""A C++ compiler that reads PyTorch's headers once for many files; install.py builds mmcv with it.

It runs the compiler named by ``ACMIX_CXX`` (default c++), with two changes. Debug information is
left out. And <torch/types.h>, whose parsing takes most of the time of an ordinary file, is compiled
once, in the folder ``ACMIX_CXX_FOLDER``, and reused by all files of the same flags. Should that
fail, the file is compiled as it would have been without.
"""

import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

HEADER = '#include <torch/types.h>\n'


def flags_of(arguments: list[str]) -> list[str] | None:
    """The arguments without files; None if this is not the compilation of one C++ file."""
    flags, sources = [], 0
    rest = iter(arguments)
    for argument in rest:
        if argument in ('-o', '-MF', '-MT', '-MQ'):
            next(rest, None)
        elif argument.endswith(('.cpp', '.cc', '.cxx')):
            sources += 1
        elif argument not in ('-c', '-MD', '-MMD'):
            flags.append(argument)
    return flags if '-c' in arguments and sources == 1 else None


def precompiled(compiler: list[str], flags: list[str], folder: Path) -> Path | None:
    """The header to include first, compiled by the first call with these flags; None on failure."""
    folder = folder / hashlib.sha256('\0'.join(flags).encode()).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    header, result = folder / 'header.h', folder / 'header.h.gch'
    # Calls run in parallel: the others wait for the first.
    with (folder / 'lock').open('w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not header.exists():
            header.write_text(HEADER)
            command = [*compiler, *flags, '-x', 'c++-header', str(header), '-o', str(result)]
            if subprocess.run(command, capture_output=True).returncode:
                result.unlink(missing_ok=True)
    return header if result.exists() else None


def main() -> None:
    compiler = shlex.split(os.environ.get('ACMIX_CXX') or 'c++')
    arguments = sys.argv[1:]
    flags = flags_of(arguments)
    if flags is not None:
        arguments.append('-g0')
        try:
            header = precompiled(compiler, [*flags, '-g0'], Path(os.environ['ACMIX_CXX_FOLDER']))
        except OSError:
            header = None
        if header:
            command = [*compiler, '-include', str(header), *arguments]
            if subprocess.run(command).returncode == 0:
                return
    os.execvp(compiler[0], [*compiler, *arguments])


if __name__ == '__main__':
    main()
