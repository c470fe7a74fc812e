"""Templates for data of one's own, from a folder of pictures to a deployed model."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from own_data import COINS, TEMPLATES, TEXTURES, make_coins, make_textures, write_config
from PIL import Image
from small_configs import build

from acmix_mm.config_check import checked_config
from acmix_mm.data_check import check_data
from acmix_mm.weights import check_starts

TASKS = ('detection', 'instance', 'semantic')
ROOT = TEMPLATES.parents[1]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder anywhere with data of one's own, few of them."""
    folder = tmp_path_factory.mktemp('own')
    make_coins(folder / 'data/coins', train=8, val=4)
    make_textures(folder / 'data/textures', train=8, val=4)
    return folder


def read(task: str, folder: Path, **changes: object) -> Config:
    """A template with a user's changes, checked with its data, as programs do."""
    write_config(task, folder / f'{task}.py', **changes)
    cfg = checked_config(str(folder / f'{task}.py'))
    check_data(cfg, ['train', 'val', 'test'])
    return cfg


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('from_scratch', [False, True])
def test_settings(task, from_scratch, folder, monkeypatch, tmp_path):
    """What the top says is in all places, and one switch decides on the start."""
    monkeypatch.chdir(folder)
    cfg = read(task, folder, from_scratch=from_scratch, batch_size=3, epochs=7)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 7
    assert cfg.train_dataloader.batch_size == 3
    start = cfg.model.backbone.init_cfg
    assert cfg.model.backbone.warm_start == (not from_scratch)
    assert cfg.default_hooks.checkpoint.save_best
    if from_scratch:
        assert start is None
        check_starts(cfg)
        assert cfg.model.neck.norm_cfg.type == 'GN'
        assert cfg.optim_wrapper.optimizer.lr == 5e-4
    else:
        assert start.checkpoint.startswith('https://github.com/')
        assert cfg.model.neck.norm_cfg is None
        assert cfg.optim_wrapper.optimizer.lr == 1e-4


@pytest.mark.parametrize('task', TASKS)
def test_trains_and_predicts(task, folder, monkeypatch):
    """One step, with a gradient for every weight, and one prediction."""
    monkeypatch.chdir(folder)
    cfg = read(task, folder, from_scratch=True)
    if task == 'instance':  # 512 a picture take long
        cfg.model.train_cfg.rcnn.sampler.num = cfg.model.test_cfg.rpn.max_per_img = 16
    model = build(cfg)

    def batch(loader: Config, count: int) -> dict:
        dataset = DATASETS.build(copy.deepcopy(loader.dataset))
        return pseudo_collate([dataset[i] for i in range(count)])

    model.train()
    data = model.data_preprocessor(batch(cfg.train_dataloader, 2), True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    with torch.no_grad():
        (sample,) = model.test_step(batch(cfg.test_dataloader, 1))
    if task == 'semantic':
        assert sample.pred_sem_seg.shape == (128, 128)
        assert len(sample.seg_logits.data) == len(TEXTURES)
    else:
        assert 'bboxes' in sample.pred_instances
        assert ('masks' in sample.pred_instances) == (task == 'instance')


def test_the_data_decide_about_label_0(folder, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = read('semantic', folder, reduce_zero_label=True, classes=TEXTURES[1:])
    init_default_scope('mmseg')
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        dataset = DATASETS.build(copy.deepcopy(loader.dataset))
        sample = dataset[0]
        found = {*sample['data_samples'].gt_sem_seg.data.unique().tolist()}
        assert found <= {0, 1, 2, 255}
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    (*_, last) = DATASETS.build(cfg.test_dataloader.dataset)[0]['data_samples']
    truth = np.asarray(Image.open(folder / 'data/textures/labels/val/0.png'), int) - 1
    np.testing.assert_array_equal(last.gt_sem_seg.data[0], np.where(truth < 0, 255, truth))


@pytest.mark.parametrize(
    ('task', 'changes', 'message'),
    [
        ('detection', {'classes': ('coins',)}, "no category has the name of class 'coins', the "
         "nearest is 'coin'"),
        ('semantic', {'classes': TEXTURES[:3]}, r'label 3 at \d+ pixels \(0 to 2 for 3 classes'),
        ('semantic', {'suffix': '.jpg'}, r"no images among its files: \d+ of \.png \(.*img_suffix"),
        ('detection', {'data_root': 'data/none/'}, 'data/none/annotations/train.json: does not'),
    ],
)  # fmt: skip
def test_what_a_user_gets_wrong(task, changes, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        read(task, folder, from_scratch=True, **changes)


# The whole way, by the programs: epochs, of eight iterations each, and the least that the best of
# them has to reach. One class for all pixels would have an mIoU of about 15.
TRAINED = {
    'detection': (4, 'coco/bbox_mAP_50', 0.8),
    'instance': (3, 'coco/segm_mAP_50', 0.8),
    'semantic': (6, 'mIoU', 30),
}
# Regions of a picture that Mask R-CNN trains with, and boxes that it looks at: not 512 and 1000.
FEW = ['model.train_cfg.rcnn.sampler.num=32', 'model.test_cfg.rpn.max_per_img=100']


@pytest.mark.slow
@pytest.mark.parametrize('task', TASKS)
def test_from_pictures_to_a_deployed_model(task, tmp_path):
    kind = 'textures' if task == 'semantic' else 'coins'
    {'coins': make_coins, 'textures': make_textures}[kind](tmp_path / 'data' / kind)
    write_config(task, tmp_path / 'mine.py', from_scratch=True, batch_size=8, epochs=40)

    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, str(ROOT / 'tools' / f'{program}.py'), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run('analysis_tools/check_dataset', 'mine.py')
    epochs, metric, least = TRAINED[task]
    few = ['--cfg-options', *FEW] if task == 'instance' else []
    said = run('train', 'mine.py', '--max-epochs', str(epochs), *few)
    (best,) = (tmp_path / 'work_dirs/mine').glob('best_*.pth')
    assert str(best.name) in said
    said = run('test', 'mine.py', str(best), '--show-dir', 'pictures')
    value = float(re.search(rf'^{metric}: (\S+)$', said, re.MULTILINE)[1])
    assert value >= least
    assert list(tmp_path.glob('work_dirs/mine/*/pictures/*'))
    run('model_converters/switch_to_deploy', 'mine.py', str(best), 'deployed.pth')
    pictures = f'data/{kind}/' + ('images/val' if task == 'semantic' else 'val')
    entries = {}
    for name, config, weights in (
        ('trained', 'mine.py', str(best)), ('deployed', 'deployed.py', 'deployed.pth')
    ):  # fmt: skip
        run('predict', pictures, config, weights, '--out-dir', name, '--score-thr', '0.3')
        entries[name] = json.loads((tmp_path / name / 'predictions.json').read_text())
        assert len(entries[name]) == 16
    if task == 'semantic':
        shares = [[e['shares'].get(c, 0) for c in TEXTURES] for e in entries['trained']]
        same = [[e['shares'].get(c, 0) for c in TEXTURES] for e in entries['deployed']]
        np.testing.assert_allclose(same, shares, atol=1e-3)
        picture = cv2.imread(str(tmp_path / 'trained/vis/0.png'))
        assert picture.mean() > 50
    else:
        boxes = [r['category'] for e in entries['trained'] for r in e['predictions']]
        assert {*boxes} == {*COINS}
        assert boxes == [r['category'] for e in entries['deployed'] for r in e['predictions']]
