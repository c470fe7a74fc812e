"""The golden files are those that their README describes."""

import hashlib
import re
from pathlib import Path

FOLDER = Path(__file__).parent / 'data' / 'golden'
README = (FOLDER / 'README.md').read_text()


def test_hashes():
    noted = re.findall(r'^([0-9a-f]{64})  (\S+)$', README, re.MULTILINE)
    files = [(hashlib.sha256(p.read_bytes()).hexdigest(), p.name) for p in FOLDER.glob('*.npz')]
    assert files
    assert sorted(noted) == sorted(files)


def test_each_file_is_described_and_used():
    for path in FOLDER.glob('*.npz'):
        (row,) = (
            line for line in README.splitlines() if line.startswith('|') and path.name in line
        )
        test = FOLDER.parents[2] / re.search(r'`(tests/\S+\.py)`', row)[1]
        assert path.stem.rpartition('_')[0] in test.read_text(), path.name
