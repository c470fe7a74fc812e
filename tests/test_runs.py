"""Training and evaluation as functions, beside the programs, which tests/tools runs."""

import math

import pytest
import torch
import train as program
from mmengine.config import Config

from acmix_mm.files import FolderInUse, claim
from acmix_mm.runs import evaluate, train

CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
OPTIONS = (
    'model.backbone.base_channels=8', 'model.neck.in_channels=[32,64,128,256]',
    'model.test_cfg.score_thr=0.0',  # hardly trained, it is sure of nothing
    'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'model.test_cfg.max_per_img=10',
)  # fmt: skip


@pytest.fixture(scope='module')
def cfg(digits_options, pytestconfig, tmp_path_factory) -> Config:
    work_dir = str(tmp_path_factory.mktemp('runs') / 'work')
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(pytestconfig.rootpath)
        args = [CONFIG, '--work-dir', work_dir, '--cfg-options', *digits_options, *OPTIONS]
        return program.build_config(program.parse_args(args))


def test_train_and_evaluate(cfg):
    """One after the other in one process; the config stays as it is for the next of them."""
    before = cfg.to_dict()
    runner = train(cfg)
    assert runner.iter == 3
    assert cfg.to_dict() == before
    validated = {
        name.removeprefix('val/'): buffer.current()
        for name, buffer in runner.message_hub.log_scalars.items()
        if name.startswith('val/coco')
    }
    metrics = evaluate(cfg, f'{cfg.work_dir}/epoch_1.pth')
    assert len(metrics) == 6
    assert all(map(math.isfinite, metrics.values()))
    assert metrics == validated
    assert cfg.to_dict() == before


def test_a_folder_that_is_in_use(cfg, tmp_path):
    cfg = Config({**cfg.to_dict(), 'work_dir': str(tmp_path)})
    with claim(tmp_path), pytest.raises(FolderInUse, match=f'{tmp_path} is in use by process'):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))


def test_what_cannot_be_run(cfg, tmp_path):
    """Is refused by a ValueError, which ends no program of a user."""
    other = Config({**cfg.to_dict(), 'load_from': 'none.pth', 'work_dir': str(tmp_path / 'w')})
    with pytest.raises(ValueError, match=r'^checkpoint none\.pth does not exist, and load_from'):
        train(other)
    torch.save({'state_dict': {'a': torch.ones(1)}}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'x\.pth does not fit config .*weights are missing'):
        evaluate(other, str(tmp_path / 'x.pth'))
    other.work_dir, other.load_from = None, None
    with pytest.raises(ValueError, match='work_dir of the config must be a folder'):
        train(other)
    assert not (tmp_path / 'w').exists()
