"""Configs in README and docs do what they are there for: each is built and trained a step."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
from mmdet.models.backbones import ResNet
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from acmix_mm.layers import ACmix

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TEXT = '\n'.join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r'^```python\n(_base_ = .*?)^```', TEXT, re.M | re.S)
SNIPPETS = [block for block in BLOCKS if '\nmodel = dict(' in block]
SIDE = 32


@pytest.fixture(scope='module')
def resnet50(tmp_path_factory) -> Path:
    """A file like torchvision's weights of ResNet-50, with statistics that a new norm has not."""
    model = ResNet(50)
    for name, buffer in model.named_buffers():
        if name.endswith(('running_mean', 'running_var')):
            nn.init.uniform_(buffer, 0.9, 0.99)
    path = tmp_path_factory.mktemp('checkpoints') / 'resnet50.pth'
    torch.save(model.state_dict(), path)
    return path


def use_file(config: dict, path: Path) -> None:
    """Put a file in the place of torchvision's weights of ResNet-50, which is on the internet."""
    for key, value in config.items():
        if isinstance(value, dict):
            use_file(value, path)
        elif key == 'checkpoint':
            assert value == 'torchvision://resnet50'
            config[key] = str(path)
        elif key == 'pretrained':
            assert value is None


def samples(scope: str) -> dict:
    """Two images with a box or a label map."""
    images = [torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8) for _ in range(2)]
    meta = {'img_shape': (SIDE, SIDE), 'ori_shape': (SIDE, SIDE), 'scale_factor': (1.0, 1.0)}
    if scope == 'mmseg':
        truth = PixelData(data=torch.randint(0, 150, (1, SIDE, SIDE)))
        sample = SegDataSample(metainfo=meta, gt_sem_seg=truth)
    else:
        boxes, labels = torch.tensor([[4.0, 4.0, 20.0, 24.0]]), torch.tensor([3])
        truth = InstanceData(bboxes=boxes, labels=labels)
        sample = DetDataSample(metainfo=meta, gt_instances=truth)
    return {'inputs': images, 'data_samples': [sample, sample.clone()]}


def test_every_kind_is_there():
    text = '\n'.join(SNIPPETS)
    for what in ('mmdet::', 'mmseg::', "type='ACmixResNet'", 'dcn=', 'conv_cfg='):
        assert what in text


@pytest.mark.parametrize(
    'snippet',
    [
        pytest.param(s, marks=pytest.mark.slow) if 'upernet' in s or 'rtmdet' in s else s
        for s in SNIPPETS
    ],
    ids=range(len(SNIPPETS)),
)
def test_config_trains(snippet, resnet50, tmp_path):
    file = tmp_path / 'user.py'
    file.write_text(snippet)
    cfg = Config.fromfile(file)
    use_file(cfg.model, resnet50)
    scope = cfg.default_scope
    init_default_scope(scope)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    operators = [m for m in model.modules() if isinstance(m, ACmix)]
    assert operators
    assert all(layer.kernel_size == (3, 3) for layer in operators)
    model.train()

    # A norm either learns, or has the statistics of what is before it.
    loaded = torch.load(resnet50)
    for name, block in model.backbone.named_modules():
        fixed = {
            child: norm
            for child, norm in block.named_children()
            if isinstance(norm, nn.BatchNorm2d) and not norm.training
        }
        assert not (fixed and any(isinstance(m, ACmix) for m in block.children())), name
        for child, norm in fixed.items():
            key = f'{name}.{child}.running_mean'.lstrip('.')
            assert torch.equal(norm.running_mean, loaded[key]), key

    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    data = model.data_preprocessor(samples(scope), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in trained.values())
