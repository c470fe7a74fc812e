import contextlib
import errno
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from acmix_mm.files import (
    FolderInUse,
    claim,
    encode_picture,
    whole_file,
    whole_folder,
    write_whole,
)


class Interrupt(Exception):
    pass


def test_a_file_is_whole_or_what_it_was(tmp_path):
    file = tmp_path / 'a.json'
    with whole_file(file) as part:
        part.write_text('first')
        assert not file.exists()
        assert part.suffix == '.json'
    with contextlib.suppress(Interrupt), whole_file(file) as part:
        part.write_text('sec')
        raise Interrupt
    assert file.read_text() == 'first'
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_names_the_file(tmp_path):
    file = tmp_path / 'a.json'
    with pytest.raises(OSError, match='No space left') as stop, whole_file(file):
        raise OSError(errno.ENOSPC, 'No space left on device')
    assert stop.value.filename == str(file)
    with pytest.raises(FileNotFoundError) as stop, whole_file(tmp_path / 'none' / 'a') as part:
        part.touch()
    assert stop.value.filename == str(tmp_path / 'none' / 'a')
    with pytest.raises(OSError, match='Permission denied') as stop, whole_file(file):
        raise OSError(errno.EACCES, 'Permission denied', 'another')
    assert stop.value.filename == 'another'


def test_a_long_name(tmp_path):
    """Up to what file systems take."""
    file = tmp_path / ('ü' * 125 + '.json')
    with whole_file(file) as part:
        part.touch()
        assert part.suffix == '.json'
    assert list(tmp_path.iterdir()) == [file]


def test_pictures(tmp_path):
    """Colours, grey levels and 16 bits come back; what a format cannot hold is refused."""
    rng = np.random.default_rng(0)
    for shape, dtype in (((3, 5, 3), np.uint8), ((3, 5), np.uint8), ((3, 5), np.uint16)):
        picture = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
        write_whole(tmp_path / 'x.png', encode_picture(picture, '.PNG'))
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'x.png')), picture)
    for suffix, size in (('.jpg', (1, 70000)), ('.none', (2, 2))):
        with pytest.raises(
            ValueError, match=rf'{size[1]}x{size[0]} pixels cannot be .* as {suffix}'
        ):
            encode_picture(np.zeros(size, np.uint8), suffix)


def test_a_folder_is_whole_or_absent(tmp_path):
    folder = tmp_path / 'sub' / 'data'
    with contextlib.suppress(Interrupt), whole_folder(folder) as part:
        (part / 'a').write_text('')
        raise Interrupt
    assert not folder.exists()
    with whole_folder(folder) as part:
        (part / 'a').write_text('whole')
        assert not folder.exists()
    assert (folder / 'a').read_text() == 'whole'
    with pytest.raises(FileExistsError, match='data exists already'), whole_folder(folder):
        pass
    assert (folder / 'a').read_text() == 'whole'


def test_a_folder_is_of_one_process(tmp_path):
    program = f'from acmix_mm.files import claim; claim({str(tmp_path)!r}); print("claimed")'
    command = [sys.executable, '-c', program]
    lock = claim(tmp_path)
    result = subprocess.run(command, capture_output=True, text=True)
    assert 'claimed' not in result.stdout
    assert f'folder {tmp_path} is in use by process' in result.stderr
    with pytest.raises(FolderInUse):
        claim(tmp_path)
    lock.close()
    assert 'claimed' in subprocess.run(command, capture_output=True, text=True).stdout
