"""Which checkpoint a run goes on from, and what becomes of those that it would write over."""

import os

import pytest
import torch

from acmix_mm.engine import newest_checkpoint, set_aside


def save(folder, name, iteration, **more):
    """A checkpoint like mmengine's, as large as its compressed parts need to be damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = {
        'meta': {'iter': iteration, 'epoch': 0},
        'state_dict': {'weight': torch.arange(5000.0)},
        'optimizer': {},
        **more,
    }
    torch.save({k: v for k, v in checkpoint.items() if v is not None}, folder / name)
    return folder / name


def say_last(folder, name):
    (folder / 'last_checkpoint').write_text(f'/elsewhere/{name}')


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == 'truncated':
        content = content[: len(content) // 2]
    elif how == 'empty':
        content = b''
    else:
        content[len(content) // 2] ^= 4  # one bit of a weight
    file.write_bytes(content)


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, the best, and a last_checkpoint whose folder is another."""
    for i in (1, 2, 10):
        save(tmp_path / 'run', f'epoch_{i}.pth', 5 * i)
    save(tmp_path / 'run', 'best_mAP_epoch_9.pth', 45, optimizer=None)
    say_last(tmp_path / 'run', 'epoch_10.pth')
    return tmp_path / 'run'


def test_the_last_one(run):
    assert newest_checkpoint(run) == str(run / 'epoch_10.pth')


@pytest.mark.parametrize('last', ['missing', 'empty', 'of a file that is gone', 'bytes'])
def test_without_a_last_checkpoint(last, run):
    file = run / 'last_checkpoint'
    if last == 'missing':
        file.unlink()
    else:
        file.write_bytes({'empty': b'', 'bytes': b'\xff\x00'}.get(last, b'/run/epoch_11.pth'))
    assert newest_checkpoint(run) == str(run / 'epoch_10.pth')


@pytest.mark.parametrize('how', ['truncated', 'empty', 'a bit'])
def test_a_damaged_one_is_passed_over_and_named(how, run, capsys):
    damage(run / 'epoch_10.pth', how)
    assert newest_checkpoint(run) == str(run / 'epoch_2.pth')
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f'passed over: checkpoint {run / "epoch_10.pth"} ')


def test_all_damaged(run):
    for file in run.glob('*.pth'):
        damage(file, 'truncated')
    with pytest.raises(ValueError, match=r'no checkpoint of .*run is whole, 4 are damaged'):
        newest_checkpoint(run)


def test_none(tmp_path):
    assert newest_checkpoint(tmp_path / 'none') is None
    save(tmp_path / 'run', 'best_mAP_epoch_9.pth', 45, optimizer=None)
    assert newest_checkpoint(tmp_path / 'run') is None


def test_one_that_last_checkpoint_does_not_know_yet(run):
    save(run, 'epoch_11.pth', 55)
    assert newest_checkpoint(run) == str(run / 'epoch_11.pth')


def test_one_that_is_not_in_its_place_yet(run):
    """A kill leaves it, whole or in part, and it is removed when training goes on."""
    save(run, '.part-epoch_11.pth', 55)
    assert newest_checkpoint(run) == str(run / 'epoch_10.pth')


def test_those_of_an_earlier_run_are_not_the_newest(run):
    """As where mmengine's own hook has begun anew in the same folder."""
    for i in (1, 2):
        os.utime(run / f'epoch_{i}.pth', (2e9 + i, 2e9 + i))
    say_last(run, 'epoch_2.pth')
    assert newest_checkpoint(run) == str(run / 'epoch_2.pth')


def test_out_dir(run, tmp_path):
    save(tmp_path / 'out' / run.name, 'epoch_3.pth', 15)
    say_last(run, 'epoch_3.pth')
    expected = str(tmp_path / 'out' / run.name / 'epoch_3.pth')
    assert newest_checkpoint(run, tmp_path / 'out') == expected


def test_set_aside(run):
    """All of them and the summary, and nothing else."""
    (run / 'log.txt').write_text('')
    for name in ('summary.md', 'summary.png', 'metrics.json'):
        (run / name).write_text(name)
    save(run, 'pretrained.pth', 0)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    moved = set_aside(run)
    assert {old.name for old in moved} == {*before} - {'log.txt', 'pretrained.pth'}
    assert all(new.read_bytes() == before[old.name] for old, new in moved.items())
    (folder,) = {new.parent for new in moved.values()}
    assert folder.parent == run
    assert folder.name.startswith('before_')
    assert {path.name for path in run.iterdir()} == {'log.txt', 'pretrained.pth', folder.name}
    assert set_aside(run) == {}


def test_set_aside_what_comes_after_the_start(run):
    moved = set_aside(run, start=run / 'epoch_2.pth')
    assert {old.name for old in moved} == {'epoch_10.pth', 'best_mAP_epoch_9.pth'}
    assert newest_checkpoint(run) == str(run / 'epoch_2.pth')


def test_set_aside_by_template(tmp_path):
    save(tmp_path / 'run', 'mine_5.pth', 5)
    assert set_aside(tmp_path / 'run') == {}
    assert len(set_aside(tmp_path / 'run', template='mine_{}.pth')) == 1
