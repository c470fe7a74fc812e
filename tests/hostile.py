"""Checkpoint files that run code where they are read without care: it makes a file."""

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

WEIGHTS = {'backbone.conv1.weight': torch.ones(2)}


class Call:
    """Pickled as a call."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def makes(marker: Path) -> Call:
    return Call(os.system, f'touch {marker}')


def by_getattr(marker: Path) -> Call:
    """Calls ``exec`` by what torch's safe loader allows, once it allows ``getattr``, too."""
    builtins = Call(getattr, getattr, '__self__')
    call = torch._tensor._rebuild_from_type_v2  # calls what it is given
    code = f'open({str(marker)!r}, "w")'
    return Call(call, Call(getattr, builtins, 'exec'), torch.Tensor, (code,), {})


class Program(nn.Module):
    """As TorchScript it makes a file when it is loaded."""

    def __init__(self, marker: str):
        super().__init__()
        self.marker = marker
        self.size = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker, self.training = state
        self.size = torch.from_file(state[0], True, 8).numel()


def write_tar(file: Path, marker: Path) -> None:
    """In PyTorch's first format."""
    with tarfile.open(file, 'w') as archive:
        for name, *values in (('storages', 0, []), ('tensors', 0), ('pickle', makes(marker))):
            content = b''.join(pickle.dumps(value, 2) for value in values)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def write_twice(file: Path, marker: Path) -> None:
    """A zip file with two pickles of one name, the later one with a call."""
    torch.save({'state_dict': WEIGHTS}, file)
    with zipfile.ZipFile(file, 'a') as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('data.pkl')]
        archive.writestr(name, pickle.dumps(makes(marker), 2))


def saved(place: Callable[[Path], object], **options) -> Callable[[Path, Path], None]:
    return lambda file, marker: torch.save(place(marker), file, **options)


# By kind, a function that writes a file which makes another.
FILES: dict[str, Callable[[Path, Path], None]] = {
    'a weight': saved(lambda m: {'state_dict': {**WEIGHTS, 'backbone.x': makes(m)}, 'meta': {}}),
    'the whole file': saved(makes),
    'meta': saved(lambda m: {'state_dict': WEIGHTS, 'meta': {'epoch': makes(m)}}),
    'message hub': saved(lambda m: {'state_dict': WEIGHTS, 'message_hub': [makes(m)]}),
    'optimizer': saved(lambda m: {'state_dict': WEIGHTS, 'optimizer': {'state': {0: makes(m)}}}),
    'open': saved(lambda m: {'state_dict': WEIGHTS, 'meta': Call(open, str(m), 'w')}),
    'getattr': saved(lambda m: {'state_dict': WEIGHTS, 'meta': by_getattr(m)}),
    'older format': saved(
        lambda m: {'state_dict': WEIGHTS, 'meta': makes(m)}, _use_new_zipfile_serialization=False
    ),
    'plain pickle': lambda file, marker: file.write_bytes(
        pickle.dumps({'state_dict': {'a': makes(marker)}})
    ),
    'TorchScript': lambda file, marker: torch.jit.save(
        torch.jit.script(Program(str(marker))), str(file)
    ),
    'tar': write_tar,
    'two pickles': write_twice,
}
