import contextlib
import subprocess
import sys

import pytest

from acmix_mm.files import FolderInUse, claim, whole_file, whole_folder


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
