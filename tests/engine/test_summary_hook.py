"""The page at the end of training: what it says, and that a resumed run has the same."""

import json
import re
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.runner import Runner
from small_runs import Each, Kill, kill, make_runner, validation

from acmix_mm.engine.summary_hook import commit, draw, smoothed, table

# No object is large, so there is no AP for them.
SCORES = [
    {'coco/bbox_mAP': value, 'b': 1 - value, 'coco/bbox_mAP_l': -1} for value in (0.25, 0.75, 0.5)
]


def train(work_dir: Path, each: Each | None = None, **settings) -> Runner:
    """Three epochs with the hook, each validated; the best is the second."""
    saving = {'save_best': 'auto', 'max_keep_ckpts': 2}
    runner = make_runner(work_dir, each, checkpoint=saving, **validation(SCORES), **settings)
    runner.register_hook({'type': 'SummaryHook'})
    runner.train()
    return runner


def rows(work_dir: Path) -> dict[str, list[str]]:
    """The cells of the page's tables, by the first of each row."""
    lines = (work_dir / 'summary.md').read_text().splitlines()
    cells = [[c.strip() for c in line.strip('|').split('|')] for line in lines if '|' in line]
    return {first: others for first, *others in cells}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Work directory of a training that was not interrupted."""
    train(tmp_path / 'whole')
    return tmp_path / 'whole'


def test_page(folder, pytestconfig):
    found = rows(folder)
    assert found['metric'] == ['best (epoch 2)', 'last (epoch 3)']
    assert found['coco/bbox_mAP'] == ['0.75', '0.5']
    assert found['b'] == ['0.25', '0.5']
    assert 'coco/bbox_mAP_l' not in found
    (best,) = found['best coco/bbox_mAP']
    assert Path(best) == folder / 'best_coco_bbox_mAP_epoch_2.pth'
    (last,) = found['last checkpoint']
    assert Path(last) == folder / 'epoch_3.pth'
    assert Path(best).is_file()
    assert Path(last).is_file()
    assert found['data'] == ['10 images to train, 4 to validate']
    assert found['length'] == ['3 epochs of 5 iterations of 2 images']
    assert re.match(r'acmix_mm \S+, Python 3\.\d+\.\d+, torch \S+', found['versions'][0])
    assert re.match(r'0:0\d:\d\d, with validation', found['wall time'][0])
    assert re.match(r'\d+\.\d\d GiB of', found['peak memory'][0])
    assert Path(found['log'][0]).is_dir()
    text = (folder / 'summary.md').read_text()
    assert '(summary.png)' in text
    picture = cv2.imread(str(folder / 'summary.png'))
    assert picture.shape[1] > 1000
    assert (picture < 200).any()


@pytest.mark.parametrize('iteration', [3, 6, 11])
def test_resumed(folder, tmp_path, iteration):
    """Killed in any epoch, and copied elsewhere: curves and metrics as in a run without an end."""
    with pytest.raises(Kill):
        train(tmp_path / 'a', Each(iteration, kill))
    runner = train(tmp_path / 'a', resume=True)
    expected, found = rows(folder), rows(tmp_path / 'a')
    for name in ('metric', 'coco/bbox_mAP', 'b', 'length', 'data'):
        assert found[name] == expected[name]
    ours, theirs = (json.loads((d / 'metrics.json').read_text()) for d in (tmp_path / 'a', folder))
    assert ours == theirs
    losses, metrics, _ = draw(runner, ours).axes
    assert len(losses.lines[0].get_xdata()) == 15
    assert [line.get_label() for line in metrics.lines] == ['coco/bbox_mAP', 'b']


def test_time_and_memory_add_up(tmp_path, monkeypatch):
    """What the interrupted part took is in its checkpoint."""
    clock = iter(range(0, 10**6, 10))  # ten seconds a look
    monkeypatch.setattr('time.monotonic', lambda: next(clock))
    monkeypatch.setattr('acmix_mm.engine.summary_hook.peak_memory', lambda: 7 * 2.0**30)
    with pytest.raises(Kill):
        train(tmp_path, Each(13, kill))  # the checkpoint is of the 10th iteration
    monkeypatch.setattr('acmix_mm.engine.summary_hook.peak_memory', lambda: 3 * 2.0**30)
    train(tmp_path, resume=True)
    found = rows(tmp_path)
    assert found['peak memory'][0].startswith('7.00 GiB')
    whole = 10 * (10 + 5 + 1)  # looks: one an iteration, and one at the end
    minutes, seconds = divmod(whole, 60)
    assert found['wall time'][0].startswith(f'0:{minutes:02d}:{seconds:02d}')


def test_started_anew_in_the_same_folder(tmp_path):
    """Metrics of the earlier run are not counted."""
    train(tmp_path)
    runner = make_runner(tmp_path, **validation(SCORES[:1] * 3))
    runner.register_hook({'type': 'SummaryHook'})
    runner.train()
    assert rows(tmp_path)['metric'] == ['last (epoch 3)']
    assert len(json.loads((tmp_path / 'metrics.json').read_text())) == 3


def test_without_validation_and_checkpoints(tmp_path):
    runner = make_runner(tmp_path, by_epoch=False, checkpoint={'interval': -1, 'save_last': False})
    runner.register_hook({'type': 'SummaryHook'})
    runner.train()
    assert 'There was no validation.' in (tmp_path / 'summary.md').read_text()
    assert rows(tmp_path)['checkpoint'] == ['none was saved']
    assert rows(tmp_path)['length'] == ['15 iterations of 2 images']


def test_best_by_what_should_be_small(tmp_path):
    saving = {'save_best': 'loss_val', 'interval': 1}
    scores = [{'loss_val': value} for value in (3.0, 1.0, 2.0)]
    runner = make_runner(tmp_path, checkpoint=saving, **validation(scores))
    runner.register_hook({'type': 'SummaryHook'})
    runner.train()
    assert rows(tmp_path)['loss_val'] == ['1', '2']


def test_commit(tmp_path, pytestconfig):
    assert commit(tmp_path / uuid.uuid4().hex) is None
    assert commit(Path('/')) is None
    found = commit(pytestconfig.rootpath)
    assert found is None or re.match(r'[0-9a-f]{12}', found)


def test_table():
    assert table({'a': 'b | c', 'dd': '1 | 22'}) == [
        '| a  | b | c  |',
        '|----|---|----|',
        '| dd | 1 | 22 |',
    ]


def test_smoothed():
    values = np.arange(200.0)
    found = smoothed(values)
    np.testing.assert_allclose(found[10:-10], values[10:-10])
    values[50] = np.nan
    assert np.isfinite(smoothed(values)).all()
