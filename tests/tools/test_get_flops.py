"""get_flops.py against mmengine's counter, and against the papers' figures."""

import re
from pathlib import Path

import get_flops
import pytest
import torch
from mmengine.analysis import FlopAnalyzer

from acmix_mm.command_line import load_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# What PyTorch's counter does not count.
NOT_PRODUCTS = ('batch_norm', 'layer_norm', 'group_norm', 'adaptive_avg_pool2d')
NOT_PRODUCTS += ('upsample_nearest2d', 'upsample_bilinear2d')


def said(capsys, config: str, *arguments: str) -> dict[str, str]:
    """The printed values by their names."""
    get_flops.main([str(CONFIGS / config), *arguments])
    return dict(re.findall(r'^(.+?): +(.+)$', capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize(
    'config',
    [
        'demo/retinanet_acmix-r26_fpn_scene-digits.py',
        'demo/acmix-pvt_fpn_scene-digits.py',
        'demo/acmix-swin_upernet_scene-digits.py',
        'demo/mask-rcnn_acmix-swin_fpn_scene-digits.py',
    ],
)
def test_equals_mmengines_counter(config, capsys):
    """Which traces the model; norms, pooling and interpolation aside, which it counts as well."""
    printed = said(capsys, config, '--shape', '64', '96')
    assert printed['image'] == '64 x 96'
    model = get_flops.build_model(load_config(str(CONFIGS / config)))
    inputs = get_flops.prepare(model, (64, 96))
    with torch.no_grad():
        analyzer = FlopAnalyzer(model, inputs).unsupported_ops_warnings(False)
        counts = analyzer.by_operator()
    products = sum(flops for name, flops in counts.items() if name not in NOT_PRODUCTS)
    number, unit = re.match(r'([\d.]+) ([MG])', printed['FLOPs']).groups()
    assert float(number) * {'M': 1e6, 'G': 1e9}[unit] == pytest.approx(products, rel=5e-3)
    count = sum(p.numel() for p in model.parameters())
    assert printed['parameters'].startswith(f'{count / 1e6:.2f} M')


# DWNet's authors print parameters and FLOPs of their detector at 1280x800 and of their segmentor at
# the size of ADE20K's test pipeline, norms and activations included.
@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'shape', 'parameters', 'flops'),
    [
        ('dwnet/dwnet-t_upernet_8xb2-160k_ade20k-512x512.py', [], 56, 928),
        (
            'dwnet/cascade-mask-rcnn_dwnet-t_fpn_8xb2-3x_coco.py',
            ['--shape', '800', '1280'],
            82,
            730,
        ),
    ],
)
def test_published_figures(config, shape, parameters, flops, capsys):
    printed = said(capsys, config, *shape)
    assert float(printed['parameters'].split()[0]) == pytest.approx(parameters, rel=0.01)
    assert float(printed['FLOPs'].split()[0]) == pytest.approx(flops, rel=0.02)


@pytest.mark.parametrize(
    ('config', 'options', 'size'),
    [
        ('acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py', None, (800, 1333)),
        ('acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py', None, (512, 2048)),
        (
            'demo/retinanet_acmix-r26_fpn_scene-digits.py',
            {'test_dataloader.dataset.pipeline': [{'type': 'CenterCrop', 'crop_size': 224}]},
            (224, 224),
        ),
    ],
)
def test_size_of_the_test_pipeline(config, options, size):
    assert get_flops.image_size(load_config(str(CONFIGS / config), options)) == size


def test_no_size():
    with pytest.raises(SystemExit, match=r'error: the test pipeline names no size .* --shape H W'):
        get_flops.main([str(CONFIGS / 'demo/retinanet_acmix-r26_fpn_scene-digits.py')])


@pytest.mark.parametrize('shape', [['0'], ['3', '4', '5']])
def test_wrong_shape(shape, capsys):
    with pytest.raises(SystemExit):
        get_flops.parse_args(['config.py', '--shape', *shape])
    assert '--shape must be one or two positive integers, got' in capsys.readouterr().err
