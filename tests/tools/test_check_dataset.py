"""tools/analysis_tools/check_dataset.py on a very small real data set."""

import check_dataset
import pytest

DETECTOR = 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py'


def test_report(digits_options, tmp_path, capsys):
    out = tmp_path / 'report.txt'
    check_dataset.main([DETECTOR, '--out', str(out), '--cfg-options', *digits_options])
    text = out.read_text()
    assert 'train_dataloader.dataset (CocoDataset), 12 images' in text
    assert 'val_dataloader.dataset (CocoDataset), 4 images' in text
    assert text.count('no problems') == 2
    printed = capsys.readouterr().out
    assert text in printed
    assert 'test: the same as val' in printed


def test_all_problems_are_reported_and_counted(digits_options, tmp_path, capsys):
    """Missing data of both splits, not only what is found first."""
    out = tmp_path / 'report.txt'
    options = [option.replace('data_root=', f'data_root={tmp_path}') for option in digits_options]
    with pytest.raises(SystemExit) as ended:
        check_dataset.main([DETECTOR, '--out', str(out), '--cfg-options', *options])
    assert ended.value.code.startswith('error: 4 errors in the data, the first: ')
    for name in ('instances_train2017.json', 'train2017/', 'instances_val2017.json', 'val2017/'):
        assert f'{name}: does not exist' in out.read_text()


@pytest.mark.parametrize('out', ['report.pdf', 'no/report.txt'])
def test_out_is_checked_first(out, tmp_path, monkeypatch):
    monkeypatch.setattr(check_dataset, 'load_config', None)
    with pytest.raises(SystemExit) as ended:
        check_dataset.main([DETECTOR, '--out', str(tmp_path / out)])
    assert ended.value.code.startswith('error: ')
