"""The programs on image classifiers, with a very small data set in ImageNet's layout."""

import importlib
import json

import predict
import pytest
import torch
from programs import program, scalars

pytest.importorskip('mmpretrain')

CONFIG = 'configs/imagenet/acmix-r26_8xb32-100e_in1k.py'
NARROW = [
    'model.backbone.base_channels=8',
    'model.head.in_channels=256',
    'model.head.num_classes=6',
    'model.data_preprocessor.num_classes=6',
    'train_dataloader.batch_size=12',
    'train_dataloader.dataset.pipeline.1.scale=64',
    # The whole image, not mirrored: random numbers would differ after resuming.
    'train_dataloader.dataset.pipeline.1.crop_ratio_range=(1.0,1.0)',
    'train_dataloader.dataset.pipeline.1.aspect_ratio_range=(1.25,1.25)',
    'train_dataloader.dataset.pipeline.2.prob=0.0',
    'default_hooks.logger.interval=1',
    'train_cfg.max_epochs=3',
    'optim_wrapper.optimizer.lr=0.02',
    'randomness.seed=0',
    # Test images as they are.
    'val_dataloader.dataset.pipeline.1.scale=40',
    'val_dataloader.dataset.pipeline.2.crop_size=40',
    'test_dataloader.dataset.pipeline.1.scale=40',
    'test_dataloader.dataset.pipeline.2.crop_size=40',
]


@pytest.fixture(scope='module')
def options(image_folders_options):
    return ['--cfg-options', *image_folders_options, *NARROW]


@pytest.fixture(scope='module')
def run(options, tmp_path_factory):
    """Work directory of three epochs of four iterations, each evaluated."""
    work_dir = tmp_path_factory.mktemp('run')
    program('train', CONFIG, '--work-dir', str(work_dir), *options)
    return work_dir


def test_train_test_predict(run, options, image_folders, tmp_path):
    """All agree on the top-1, test.py and predict.py by the names of the folders too."""
    trained = [row for row in scalars(run) if 'accuracy/top1' in row]
    assert len(trained) == 3
    checkpoint = run / 'epoch_3.pth'
    weights = torch.load(checkpoint, weights_only=False)['state_dict']
    assert {name.split('.')[0] for name in weights} == {'backbone', 'head'}

    out = program(
        'test', CONFIG, str(checkpoint), '--work-dir', str(tmp_path / 'test'), '--show-dir',
        'pictures', *options,
    )  # fmt: skip
    lines = dict(line.split(': ', 1) for line in out.splitlines() if line.startswith('accuracy/'))
    assert float(lines['accuracy/top1']) == pytest.approx(trained[-1]['accuracy/top1'], abs=1e-3)
    assert float(lines['accuracy/top5']) == pytest.approx(trained[-1]['accuracy/top5'], abs=1e-3)
    assert len(list((tmp_path / 'test').glob('*/pictures/*.png'))) == 18

    right = {1: 0, 5: 0}
    for folder in sorted((image_folders / 'val').iterdir()):
        to = tmp_path / folder.name
        predict.main([str(folder), CONFIG, str(checkpoint), '--out-dir', str(to), '--batch-size',
                      '2', '--device', 'cpu', *options])  # fmt: skip
        assert len(list((to / 'vis').glob('*.png'))) == 3
        entries = json.loads((to / 'predictions.json').read_text())
        assert [entry['image'] for entry in entries] == sorted(p.name for p in folder.iterdir())
        for entry in entries:
            rows = entry['predictions']
            assert len(rows) == 5
            assert [row['score'] for row in rows] == sorted(r['score'] for r in rows)[::-1]
            assert sum(row['score'] for row in rows) <= 1 + 1e-6
            names = sorted(p.name for p in (image_folders / 'train').iterdir())
            assert all(names[row['label']] == row['category'] for row in rows)
            for k in right:
                right[k] += folder.name in [row['category'] for row in rows[:k]]
    assert right[1] > 18 / 6  # better than chance: labels are not another order's
    for k, count in right.items():
        assert float(lines[f'accuracy/top{k}']) == pytest.approx(100 * count / 18, abs=1e-3)


@pytest.mark.slow
def test_resume_equals_uninterrupted(run, options, tmp_path):
    """From the checkpoint after epoch 2, the third epoch has the same losses and weights."""
    arguments = ['--resume', str(run / 'epoch_2.pth'), '--work-dir', str(tmp_path), *options]
    program('train', CONFIG, *arguments)
    expected = [row['loss'] for row in scalars(run) if 'loss' in row][8:]
    assert [row['loss'] for row in scalars(tmp_path) if 'loss' in row] == expected
    ours, theirs = (
        torch.load(folder / 'epoch_3.pth', weights_only=False)['state_dict']
        for folder in (tmp_path, run)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_classes_of_another_data_set(run, options, tmp_path, image_folders, capsys):
    """A checkpoint that does not name its classes is refused, not read by ImageNet's names."""
    checkpoint = torch.load(run / 'epoch_3.pth', weights_only=False)
    del checkpoint['meta']['dataset_meta']
    torch.save(checkpoint, tmp_path / 'bare.pth')
    with pytest.raises(SystemExit) as stop:
        predict.main([str(image_folders / 'val' / 'n01'), CONFIG, str(tmp_path / 'bare.pth'),
                      '--out-dir', str(tmp_path / 'out'), '--device', 'cpu', *options])  # fmt: skip
    assert str(stop.value) == (
        f'error: checkpoint {tmp_path / "bare.pth"} must name the classes of its data set: it '
        f'names 1000, the model has 6'
    )


@pytest.mark.parametrize('name', ['train', 'test', 'predict'])
def test_without_mmpretrain(name, monkeypatch, tmp_path):
    """One line says what to install."""
    monkeypatch.setattr('acmix_mm.config_check.find_spec', lambda name: None)
    arguments = [CONFIG] if name == 'train' else [CONFIG, 'x.pth']
    if name == 'predict':
        arguments = [CONFIG, *arguments, '--out-dir', str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(name).main(arguments)
    assert str(stop.value) == (
        f'error: config {CONFIG} is for mmpretrain, which is not installed: '
        f'pip install onedl-mmpretrain==1.3.6'
    )
