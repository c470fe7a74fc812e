"""train.py --tensorboard: what TensorBoard shows is what scalars.json has."""

import importlib.util

import pytest
import train
from programs import program, scalars

CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'


def test_missing_tensorboard_is_told(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name: None if name == 'tensorboard' else find(name)
    )
    with pytest.raises(SystemExit, match=r'error: --tensorboard needs .*: pip install tensorboard'):
        train.build_config(train.parse_args([CONFIG, '--tensorboard']))


@pytest.mark.parametrize(
    'visualizer', [None, {'type': 'Visualizer'}, {'type': 'Visualizer', 'vis_backends': None}]
)
def test_backend_is_added_to_any_config(visualizer):
    pytest.importorskip('tensorboard')
    cfg = train.Config({} if visualizer is None else {'visualizer': visualizer})
    for _ in range(2):  # once is enough
        train.add_tensorboard(cfg)
    names = [backend.type for backend in cfg.visualizer.vis_backends]
    assert names == ['LocalVisBackend'][: visualizer is None] + ['TensorboardVisBackend']


@pytest.mark.slow
def test_curves(digits_options, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    program(
        'train', CONFIG, '--tensorboard', '--work-dir', str(tmp_path), '--cfg-options',
        *digits_options, 'default_hooks.logger.interval=1', 'train_cfg.max_epochs=1',
        'model.test_cfg.score_thr=0.0',
    )  # fmt: skip
    (file,) = tmp_path.glob('*/vis_data/events.out.tfevents.*')
    events = EventAccumulator(str(file.parent)).Reload()
    rows = scalars(tmp_path)
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert losses
    assert [event.value for event in events.Scalars('loss')] == pytest.approx(losses)
    (metric,) = events.Scalars('coco/bbox_mAP_50')
    assert metric.value == pytest.approx(rows[-1]['coco/bbox_mAP_50'])
