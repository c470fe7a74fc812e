"""Files and folders that are whole or absent, whatever interrupts, and folders of one process."""

import contextlib
import fcntl
import io
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import cv2
import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FolderInUse(ValueError):
    """A folder that another process has claimed."""


@contextlib.contextmanager
def naming(path: str | Path, instead_of: Path | None = None) -> Iterator[None]:
    """Context in which errors of the system that name no file, as of a full disk, name this one.

    Args:
        path (str | Path): What is written to.
        instead_of (Path | None): Another name to be replaced by it. Default: None.
    """
    try:
        yield
    except OSError as error:
        if error.errno and error.filename in (None, str(instead_of)):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def whole_file(file: str | Path) -> Iterator[Path]:
    """Context in which a file is written beside its place, which it takes when it is whole.

    Until then, and after an exception, what has been there stays as it was. After a kill the part
    that was written stays beside it, hidden, until the same file is written again.

    Args:
        file (str | Path): Where it belongs; its folder must exist.

    Yields:
        Path: What to write instead, in the same folder and of the same suffix.

    Raises:
        OSError: If it cannot be written, of a full disk for example; it names ``file``.
    """
    file = Path(file)
    part = part_of(file)
    try:
        with naming(file, instead_of=part):
            yield part
            _sync(part)
            os.replace(part, file)
            _sync(file.parent)
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder: str | Path) -> None:
    """Remove what :func:`whole_file` has left in a folder when processes were killed."""
    for part in Path(folder).glob(part_of(Path('*')).name):
        part.unlink()


def write_whole(file: str | Path, content: bytes | memoryview | str) -> None:
    """Write a file in the context :func:`whole_file`; text is encoded in UTF-8."""
    with whole_file(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


# Libraries that write to a file themselves say little where they cannot: torch that a position is
# unexpected, OpenCV nothing at all. So they fill memory, and this module writes it.


def write_checkpoint(file: str | Path, state: dict) -> None:
    """:func:`write_whole` of what ``torch.save`` makes of a checkpoint."""
    content = io.BytesIO()
    torch.save(state, content)
    write_whole(file, content.getbuffer())


def write_figure(file: str | Path, figure: 'Figure', dpi: int) -> None:
    """:func:`write_whole` of a figure of matplotlib, in the format of the suffix."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(file).suffix[1:], dpi=dpi)
    write_whole(file, content.getbuffer())


def encode_picture(image: np.ndarray, suffix: str, parameters: Sequence[int] = ()) -> bytes:
    """A picture as the content of a file.

    Args:
        image (np.ndarray): Grey levels or labels (H, W), or RGB (H, W, 3).
        suffix (str): That of the file, which decides on the format.
        parameters (Sequence[int]): Of ``cv2.imencode``. Default: none.

    Raises:
        ValueError: If the format cannot hold such a picture.
    """
    if image.ndim == 3:
        image = np.ascontiguousarray(image[..., ::-1])
    try:
        done, content = cv2.imencode(suffix, image, parameters)
    except cv2.error as error:
        done, reason = False, f': {error.err}'
    else:
        reason = ''
    if not done:
        size = 'x'.join(map(str, image.shape[1::-1]))
        raise ValueError(f'a picture of {size} pixels cannot be written as {suffix}{reason}')
    return content.tobytes()


@contextlib.contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Context in which a folder is filled beside its place, which it takes when it is whole.

    Args:
        folder (str | Path): Where it belongs. Its parents are made.

    Yields:
        Path: An empty folder to be filled instead.

    Raises:
        FileExistsError: If there is something already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f'{folder} exists already')
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def claim(folder: str | Path) -> IO[str]:
    """Claim a folder for this process until the returned file is closed, or the process ends.

    Processes forked from this one do not prolong it. Where the file system has no locks, there is a
    warning.

    Args:
        folder (str | Path): An existing folder; it gets a hidden file ``.lock``.

    Raises:
        FolderInUse: If another process has it; the message names folder and process.
    """
    lock = open(Path(folder, '.lock'), 'a+')  # noqa: SIM115, closed by the caller
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        process = lock.read().strip() or 'unknown'
        lock.close()
        raise FolderInUse(f'folder {folder} is in use by process {process}') from None
    except OSError as error:  # some file systems of clusters have none
        warnings.warn(f'folder {folder} cannot be locked: {error.strerror}', stacklevel=2)
    # The workers of a data loader outlive a killed training for some seconds.
    os.register_at_fork(after_in_child=lock.close)
    lock.truncate(0)
    with naming(lock.name):
        lock.write(str(os.getpid()))
        lock.flush()
    return lock


def part_of(path: Path) -> Path:
    """What stands hidden beside a path until it is whole."""
    name = path.name
    if len(os.fsencode(name)) > 240:  # file systems take 255 bytes
        name = name[-60:]
    return path.with_name(f'.part-{name}')


def _sync(path: Path) -> None:
    """Have the disk hold what has been written to a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
