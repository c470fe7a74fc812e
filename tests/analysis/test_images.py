"""Where the pixels of an image are in the input of a network."""

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from torch import nn

from acmix_mm.analysis.images import ImageLoader

PACK = {
    'mmdet': {'type': 'PackDetInputs', 'meta_keys': ('img_id', 'ori_shape', 'img_shape')},
    'mmseg': {'type': 'PackSegInputs'},
    'mmpretrain': {'type': 'PackInputs'},
}
PREPROCESSORS = {
    'mmdet': {'type': 'DetDataPreprocessor', 'pad_size_divisor': 32},
    'mmseg': {'type': 'SegDataPreProcessor', 'size_divisor': 32, 'test_cfg': {'size_divisor': 32}},
    'mmpretrain': {'type': 'ClsDataPreprocessor'},
}


def loader_of(scope: str, *transforms: dict, load: bool = True) -> ImageLoader:
    if scope == 'mmpretrain':
        pytest.importorskip('mmpretrain')
    elif scope == 'mmseg':
        pytest.importorskip('mmseg.models')
    else:
        pytest.importorskip('mmdet.models')
    pipeline = [
        *([{'type': 'LoadImageFromFile'}] if load else []),
        *transforms,
        {'type': 'LoadAnnotations'},
        PACK[scope],
    ]
    dataset = {'type': 'RepeatDataset', 'dataset': {'pipeline': pipeline}}
    cfg = Config({'default_scope': scope, 'test_dataloader': {'dataset': dataset}})
    init_default_scope(scope)
    model = nn.Module()
    model.data_preprocessor = MODELS.build({**PREPROCESSORS[scope]})
    return ImageLoader(cfg, model)


CASES = {
    'as it is': ('mmdet', ()),
    'keeping the ratio': ('mmdet', ({'type': 'Resize', 'scale': (96, 80), 'keep_ratio': True},)),
    'another ratio': ('mmdet', ({'type': 'Resize', 'scale': (64, 128), 'keep_ratio': False},)),
    'padded': (
        'mmdet',
        (
            {'type': 'Resize', 'scale': (40, 40), 'keep_ratio': True},
            {'type': 'Pad', 'size': (70, 50)},
        ),
    ),
    'segmentor': (
        'mmseg',
        (
            {'type': 'Resize', 'scale': (200, 60), 'keep_ratio': True},
            {'type': 'ResizeToMultiple', 'size_divisor': 32},
        ),
    ),
    'classifier': (
        'mmpretrain',
        (
            {'type': 'ResizeEdge', 'scale': 40, 'edge': 'short', 'backend': 'pillow'},
            {'type': 'CenterCrop', 'crop_size': 32},
        ),
    ),
}


@pytest.mark.parametrize('name', CASES)
def test_a_bright_spot_is_where_the_frame_says(name, tmp_path):
    """Its centre of mass, on an image of 48x80."""
    scope, transforms = CASES[name]
    loader = loader_of(scope, *transforms)
    for top, left in ((18, 30), (10, 42)):
        image = np.zeros((48, 80, 3), np.uint8)
        image[top : top + 8, left : left + 8] = 200
        file = tmp_path / 'spot.png'
        Image.fromarray(image).save(file)
        data, frame = loader.load(file)
        inputs = loader.model.data_preprocessor(data, False)['inputs'][0, 0].double().numpy()
        assert inputs.shape == frame.input
        inputs = inputs / inputs.sum()
        rows, cols = (np.arange(n) + 0.5 for n in inputs.shape)
        centre = (inputs.sum(0) @ cols, inputs.sum(1) @ rows)
        assert centre == pytest.approx(frame.to_input(left + 4, top + 4), abs=0.15)
        assert frame.to_image(*frame.to_input(left, top)) == pytest.approx((left, top))
        row, col = frame.cell(left + 4, top + 4, frame.input)
        assert inputs[row, col] > 0.9 * inputs.max()


def test_padding_is_not_visible(tmp_path):
    """What the network sees ends where the image does."""
    file = tmp_path / 'image.png'
    Image.fromarray(np.zeros((48, 80, 3), np.uint8)).save(file)
    _, frame = loader_of('mmdet', {'type': 'Resize', 'scale': (40, 40), 'keep_ratio': True}).load(
        file
    )
    assert frame.image == (48, 80)
    assert frame.visible == (24, 40)
    assert frame.input == (32, 64)
    assert frame.cell(79, 47, (32, 64)) == (23, 39)


@pytest.mark.parametrize(
    ('transform', 'message'),
    [
        ({'type': 'RandomFlip', 'prob': 1.0}, 'test pipeline must not flip images'),
        (
            {'type': 'RandomCrop', 'crop_size': (20, 20)},
            r'only scale, crop centrally or pad .*; RandomCrop changes \(48, 80\) to \(20, 20\)',
        ),
    ],
)
def test_other_transforms_are_refused(tmp_path, transform, message):
    file = tmp_path / 'image.png'
    Image.fromarray(np.zeros((48, 80, 3), np.uint8)).save(file)
    with pytest.raises(ValueError, match=message):
        loader_of('mmdet', transform).load(file)


def test_bad_pipelines(tmp_path):
    with pytest.raises(ValueError, match=r'config must have test_dataloader\.dataset\.pipeline'):
        ImageLoader(Config({}), nn.Module())
    file = tmp_path / 'image.png'
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    loader = loader_of('mmdet')
    loader.model.test_cfg = {'mode': 'slide'}
    with pytest.raises(ValueError, match=r"mode must be 'whole', .* got 'slide'"):
        loader.load(file)


@pytest.mark.parametrize(
    ('content', 'why'),
    [
        (None, 'is no file, or a link to none'),
        (b'', 'the file is empty'),
        (b'no picture', 'is no picture'),
        ('truncated', 'image file is truncated'),
        ('folder', 'is a folder'),
    ],
)
def test_bad_images(tmp_path, content, why):
    file = tmp_path / 'image.png'
    if content == 'folder':
        file.mkdir()
    elif content == 'truncated':
        noise = np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:5000])
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf'image .*image\.png cannot be read: {why}'):
        loader_of('mmdet').load(file)
