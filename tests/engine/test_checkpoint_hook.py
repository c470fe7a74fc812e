"""Checkpoints are whole or absent, and the old ones go last."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.fileio import get_file_backend
from small_runs import Each, Kill, kill, make_runner, validation, weights

from acmix_mm.engine import WholeFileBackend, newest_checkpoint


def names(folder) -> list[str]:
    """The files of a work directory but the copy of the config."""
    return sorted(p.name for p in folder.iterdir() if p.is_file() and p.suffix != '.py')


@pytest.fixture
def moments(monkeypatch, tmp_path):
    """What is in the work directory whenever a file is about to take its place."""
    seen = []
    replace = os.replace

    def note(source, target):
        seen.append((Path(target).name, names(tmp_path / 'run')))
        replace(source, target)

    monkeypatch.setattr(os, 'replace', note)
    return seen


def test_old_checkpoint_is_there_until_the_new_one_is(moments, tmp_path):
    make_runner(tmp_path / 'run', checkpoint={'max_keep_ckpts': 1}).train()
    assert [target for target, _ in moments] == [
        name for i in (1, 2, 3) for name in (f'epoch_{i}.pth', 'last_checkpoint')
    ]
    for (_, before), (_, after), i in zip(moments[2::2], moments[3::2], (2, 3), strict=True):
        assert set(before) == {f'epoch_{i - 1}.pth', f'.part-epoch_{i}.pth', 'last_checkpoint'}
        assert {f'epoch_{i - 1}.pth', f'epoch_{i}.pth'} < set(after)
    assert names(tmp_path / 'run') == ['epoch_3.pth', 'last_checkpoint']
    last = (tmp_path / 'run' / 'last_checkpoint').read_text()
    assert last == str(tmp_path / 'run' / 'epoch_3.pth')


@pytest.mark.parametrize('target', ['epoch_2.pth', 'last_checkpoint'])
def test_killed_at_a_checkpoint(target, monkeypatch, tmp_path):
    """Just before or after the second of three checkpoints is there, of which one is kept."""
    settings = {'checkpoint': {'max_keep_ckpts': 1}}
    whole = make_runner(tmp_path / 'whole', **settings)
    whole.train()
    replace = os.replace

    def replace_or_die(source, file):
        second = '.part-epoch_2.pth' if target == 'epoch_2.pth' else 'epoch_2.pth'
        if Path(file).name == target and second in names(tmp_path / 'run'):
            raise Kill
        replace(source, file)

    monkeypatch.setattr(os, 'replace', replace_or_die)
    with pytest.raises(Kill):
        make_runner(tmp_path / 'run', **settings).train()
    monkeypatch.undo()
    (tmp_path / 'run' / '.part-epoch_2.pth').write_text('as a kill leaves it')
    saved = '1' if target == 'epoch_2.pth' else '2'
    assert newest_checkpoint(tmp_path / 'run') == str(tmp_path / 'run' / f'epoch_{saved}.pth')
    resumed = make_runner(tmp_path / 'run', resume=True, **settings)
    resumed.train()
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
    assert names(tmp_path / 'run') == ['epoch_3.pth', 'last_checkpoint']


def test_full_disk(monkeypatch, tmp_path):
    """The old checkpoint is whole, nothing of the new one is left, the error names it."""
    run = tmp_path / 'run'

    def write(descriptor):
        if (run / 'last_checkpoint').exists() and (run / '.part-epoch_2.pth').exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', write)
    with pytest.raises(OSError, match='No space left on device') as error:
        make_runner(run, checkpoint={'max_keep_ckpts': 1}).train()
    assert Path(error.value.filename).name == 'epoch_2.pth'
    assert names(run) == ['epoch_1.pth', 'last_checkpoint']
    assert newest_checkpoint(run) == str(run / 'epoch_1.pth')


def test_file_backend(tmp_path):
    backend = get_file_backend(tmp_path / 'a' / 'b.txt', backend_args={'backend': 'whole_file'})
    assert type(backend) is WholeFileBackend
    backend.put_text('text', tmp_path / 'a' / 'b.txt')
    backend.put(b'bytes', str(tmp_path / 'a' / 'c.txt'))
    assert names(tmp_path / 'a') == ['b.txt', 'c.txt']
    assert backend.get_text(tmp_path / 'a' / 'b.txt') == 'text'
    assert backend.get(tmp_path / 'a' / 'c.txt') == b'bytes'


def test_copied_folder_goes_on_from_its_own(tmp_path):
    """And leaves the original as it is."""
    with pytest.raises(Kill):
        make_runner(tmp_path / 'a', Each(8, kill), checkpoint={'max_keep_ckpts': 1}).train()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / 'a').iterdir()}
    shutil.move(tmp_path / 'b', tmp_path / 'c')
    runner = make_runner(tmp_path / 'c', resume=True, checkpoint={'max_keep_ckpts': 1})
    runner.train()
    assert runner._load_from == str(tmp_path / 'c' / 'epoch_1.pth')
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / 'a').iterdir()} == before
    assert names(tmp_path / 'c') == ['epoch_3.pth', 'last_checkpoint']


def test_config_in_a_checkpoint_is_not_executed(tmp_path):
    make_runner(tmp_path).train()
    file = tmp_path / 'epoch_3.pth'
    checkpoint = torch.load(file, weights_only=True)
    checkpoint['meta']['config'] = f'open({str(tmp_path / "executed")!r}, "w")'
    checkpoint['meta']['epoch'] = 2
    torch.save(checkpoint, file)
    make_runner(tmp_path, resume=True).train()
    assert not (tmp_path / 'executed').exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    runner = make_runner(tmp_path)

    def spoil():
        runner.model.line.weight.data[0, 1] = float('inf')

    runner.register_hook(Each(10, spoil))
    with pytest.raises(FloatingPointError, match=r'line\.weight is not finite.*epoch_1\.pth'):
        runner.train()
    assert names(tmp_path) == ['epoch_1.pth', 'last_checkpoint']


def test_values_that_never_were_finite_are_saved(tmp_path):
    runner = make_runner(tmp_path)
    runner.model.register_buffer('mask', torch.tensor([0.0, float('-inf')]))
    runner.train()
    assert torch.load(tmp_path / 'epoch_3.pth', weights_only=True)['state_dict']['mask'].isinf()[1]


def best_runner(work_dir, scores, each=None, **settings):
    """Evaluated after each epoch, with given scores."""
    saving = {'max_keep_ckpts': 1, 'save_best': list(scores[0]), 'rule': 'greater'}
    return make_runner(work_dir, each, checkpoint=saving, **validation(scores), **settings)


@pytest.mark.parametrize('metrics', ['a', 'ab'])
def test_best_checkpoint_goes_last(metrics, moments, tmp_path):
    scores = [dict.fromkeys(metrics, score) for score in (0.1, 0.3, 0.2)]
    best_runner(tmp_path / 'run', scores).train()
    kept = [f'best_{metric}_epoch_2.pth' for metric in metrics]
    assert names(tmp_path / 'run') == [*kept, 'epoch_3.pth', 'last_checkpoint']
    for name in kept:
        (before,) = [files for target, files in moments if target == name]
        assert name.replace('2', '1') in before


def test_best_checkpoint_of_a_copied_folder(tmp_path):
    scores = [{'a': 0.1}, {'a': 0.2}, {'a': 0.3}]
    with pytest.raises(Kill):
        best_runner(tmp_path / 'a', scores, Each(8, kill)).train()
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    before = names(tmp_path / 'a')
    assert before == ['best_a_epoch_1.pth', 'epoch_1.pth', 'last_checkpoint']
    best_runner(tmp_path / 'b', scores, resume=True).train()
    assert names(tmp_path / 'a') == before
    assert names(tmp_path / 'b') == ['best_a_epoch_3.pth', 'epoch_3.pth', 'last_checkpoint']


@pytest.mark.parametrize(
    ('names', 'main'),
    [
        (['coco/cat_precision', 'coco/bbox_mAP', 'coco/segm_mAP'], 'coco/bbox_mAP'),
        (['aAcc', 'mIoU', 'mAcc'], 'mIoU'),
        (['accuracy/top5', 'accuracy/top1'], 'accuracy/top1'),
        (['pascal_voc/AP50', 'pascal_voc/mAP'], 'pascal_voc/mAP'),
        (['mAcc', 'mDice'], 'mAcc'),  # none of these: the first
    ],
)
def test_best_by_itself(names, main, tmp_path):
    """Which of an evaluation's metrics decides, where the config leaves it open."""
    scores = [{n: value if n == main else 1 - value for n in names} for value in (0.1, 0.9, 0.5)]
    make_runner(tmp_path, checkpoint={'save_best': 'auto'}, **validation(scores)).train()
    name = f'best_{main.replace("/", "_")}_epoch_2.pth'
    assert [file.name for file in tmp_path.glob('best_*')] == [name]
