"""Tools of the installed packages, run by acmix_mm.upstream."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import program

from acmix_mm import upstream

CONFIG = 'configs/demo/r26_scene-digits.py'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['mmcv'], "PACKAGE must be one of mmdet, mmseg, mmpretrain, got 'mmcv'"),
        (['mmdet', 'analysis_tools/none'], "mmdet has no tool 'analysis_tools/none'; python -m"),
    ],
)
def test_wrong_names(arguments, message):
    with pytest.raises(SystemExit, match=f'^error: {message}'):
        upstream.main(arguments)


def test_missing_package(monkeypatch):
    monkeypatch.setattr(upstream.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(SystemExit, match=r'^error: PACKAGE mmseg is not installed$'):
        upstream.main(['mmseg'])


def test_lists_tools(capsys):
    upstream.main(['mmseg'])
    assert 'analysis_tools/browse_dataset' in capsys.readouterr().out.splitlines()


def run(*arguments: str) -> str:
    """What a tool prints."""
    command = [sys.executable, '-m', 'acmix_mm.upstream', *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_what_fails_by_itself_today(single_digits_options, tmp_path):
    """Of a classifier without torchvision, with PyTorch's safe loader and today's matplotlib."""
    pytest.importorskip('mmpretrain')
    options = ['--cfg-options', *single_digits_options, 'train_cfg.max_epochs=1']
    program('train', CONFIG, '--work-dir', str(tmp_path), *options)
    checkpoint, out = tmp_path / 'epoch_1.pth', tmp_path / 'out.pkl'
    said = program('test', CONFIG, str(checkpoint), '--out', str(out),
                   '--work-dir', str(tmp_path / 'test'), *options)  # fmt: skip
    top1 = float(re.search(r'^accuracy/top1: (\S+)$', said, re.MULTILINE)[1])

    evaluate = ('analysis_tools/eval_metric', str(out), '--metric', 'type=Accuracy')
    assert f"'accuracy/top1': {top1}" in run('mmpretrain', *evaluate)
    picture = tmp_path / 'confusion.png'
    matrix = ('analysis_tools/confusion_matrix', CONFIG, str(out), '--show-path', str(picture))
    run('mmpretrain', *matrix, *options)
    assert picture.is_file()
    folder = tmp_path / 'pictures'
    browse = ('visualization/browse_dataset', CONFIG, '--output-dir', str(folder), '--not-show')
    run('mmpretrain', *browse, '--show-number', '3', *options)
    assert len(list(folder.iterdir())) == 3
    run('mmdet', 'model_converters/publish_model', str(checkpoint), str(tmp_path / 'public.pth'))
    time.sleep(1)  # it does not wait for the renaming that it starts
    (public,) = tmp_path.glob('public-*.pth')
    weights = torch.load(public, weights_only=False)['state_dict']
    assert weights.keys() == torch.load(checkpoint, weights_only=False)['state_dict'].keys()


@pytest.mark.slow
def test_curves_of_any_log(label_map_options, tmp_path):
    """By mmpretrain's tool, of a segmentor, too."""
    pytest.importorskip('mmpretrain')
    program(
        'train', 'configs/demo/acmix-pvt_fpn_scene-digits.py', '--work-dir', str(tmp_path),
        '--cfg-options', *label_map_options, 'train_cfg.max_epochs=1',
        'default_hooks.logger.interval=1',
    )  # fmt: skip
    (log,) = map(str, tmp_path.glob('*/vis_data/scalars.json'))
    out = tmp_path / 'curve.png'
    plot = ('analysis_tools/analyze_logs', 'plot_curve', log, '--keys', 'loss', 'mIoU')
    run('mmpretrain', *plot, '--out', str(out))
    assert Path(out).is_file()
    assert 's/iter' in run('mmpretrain', 'analysis_tools/analyze_logs', 'cal_train_time', log)
