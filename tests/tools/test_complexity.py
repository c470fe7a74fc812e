"""complexity.py against mmengine's counter, and against the papers' figures."""

import csv
import json
import re
from pathlib import Path

import complexity
import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from refusals import refusal
from torch import nn

from acmix_mm.analysis.costs import prediction
from acmix_mm.analysis.networks import initial_model
from acmix_mm.command_line import load_config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
DEMO = 'demo/retinanet_acmix-r26_fpn_scene-digits.py'
# What PyTorch's counter does not count.
NOT_PRODUCTS = ('batch_norm', 'layer_norm', 'group_norm', 'adaptive_avg_pool2d')
NOT_PRODUCTS += ('upsample_nearest2d', 'upsample_bilinear2d')
UNITS = {'': 1, 'M': 1e6, 'G': 1e9}


def said(capsys, config: str, *arguments: str) -> str:
    """What is printed."""
    complexity.main([str(CONFIGS / config), *map(str, arguments)])
    return capsys.readouterr().out


def values(text: str) -> dict[str, str]:
    """The printed values by their names."""
    return dict(re.findall(r'^(.+?): +(.+)$', text, re.MULTILINE))


def number(text: str) -> float:
    """A printed number with its unit."""
    digits, unit = re.match(r'([\d.,]+) ?([MG]?)', text).groups()
    return float(digits.replace(',', '')) * UNITS[unit]


class Prediction(nn.Module):
    """A function of images and the model that it calls, to be traced."""

    def __init__(self, function, model):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, images):
        return self.function(images)


@pytest.mark.parametrize(
    'config',
    [
        DEMO,
        'demo/acmix-pvt_fpn_scene-digits.py',
        'demo/acmix-swin_upernet_scene-digits.py',
        'demo/mask-rcnn_acmix-swin_fpn_scene-digits.py',
    ],
)
def test_equals_mmengines_counter(config, capsys):
    """Which traces the model; norms, pooling and interpolation aside, which it counts as well."""
    printed = values(said(capsys, config, '--shape', 64, 96))
    assert printed['image'] == '64 x 96'
    model = initial_model(load_config(str(CONFIGS / config)))
    function, images = prediction(model, (64, 96))
    with torch.no_grad():
        analyzer = FlopAnalyzer(Prediction(function, model).eval(), images)
        counts = analyzer.unsupported_ops_warnings(False).by_operator()
    products = sum(flops for name, flops in counts.items() if name not in NOT_PRODUCTS)
    assert number(printed['FLOPs']) == pytest.approx(products, rel=5e-3)
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
    text = said(capsys, config, *shape)
    printed = values(text)
    assert number(printed['parameters']) == pytest.approx(1e6 * parameters, rel=0.01)
    assert number(printed['FLOPs']) == pytest.approx(1e9 * flops, rel=0.02)
    assert text.splitlines()[3:] == ['operators:  none is mixed', '']


def test_shares_of_resnet50(capsys):
    """The paper's Table 1 has 99 % and 83 %."""
    text = said(capsys, 'acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py', '--shape', 64)
    assert values(text)['operators'] == '16 mixed (ACmix)'
    shares = text.partition("Stage I's share\n")[2].splitlines()
    got = {re.split(r' {2,}', line.strip())[0]: re.findall(r'([\d.]+)%', line) for line in shares}
    convolution = got['plain convolutions in their place']
    attention = got['both stages at the size of the output']
    assert convolution == ['99.3', '99.3']
    assert attention == ['82.0', '83.2']
    for printed, paper in ((convolution, 99), (attention, 83)):
        assert [float(share) for share in printed] == [pytest.approx(paper, abs=1)] * 2
    assert 'convolution 99 %, self-attention 83 %' in text


def test_table_and_files(capsys, tmp_path):
    """They agree with each other, and the table's stages sum up."""
    files = {name: tmp_path / f'out.{name}' for name in ('json', 'csv', 'png')}
    options = ('--json', files['json'], '--csv', files['csv'], '--plot', files['png'])
    text = said(capsys, DEMO, '--shape', 60, 96, '--by-layer', *options)
    assert text.splitlines()[-3:] == [
        f'costs:      {files["json"]}', f'table:      {files["csv"]}', f'plot:       {files["png"]}'
    ]  # fmt: skip
    assert 'image:      60 x 96, padded to 64 x 96\n' in text
    content = json.loads(files['json'].read_text())
    with files['csv'].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content['operators']) == 8
    layers = [line.split() for line in text.splitlines() if line.startswith('backbone.')]
    assert len(layers) == 8
    for operator, row, layer in zip(content['operators'], rows, layers, strict=True):
        assert operator['name'] == row['operator'] == layer[0]
        stages = ('projection', 'attention', 'convolution')
        flops = [operator['mixed'][stage]['flops'] for stage in stages]
        assert [int(row[f'mixed {stage} flops']) for stage in stages] == flops
        assert operator['counted'] == int(row['counted']) == sum(flops)
        assert f'{flops[0] / 1e6:.2f}' in layer
        assert layer.count(f'{sum(flops) / 1e6:.2f}') == 2  # as closed form, and as counted
    total = sum(o['mixed'][stage]['flops'] for o in content['operators'] for stage in stages)
    printed = re.search(r'^  both stages .* ([\d.]+ [MG])', text, re.MULTILINE)[1]
    assert number(printed) == pytest.approx(total, rel=5e-3)
    assert number(values(text)['FLOPs']) == pytest.approx(content['whole']['flops'], rel=5e-3)
    assert files['png'].stat().st_size > 5000


@pytest.mark.parametrize('mix', ['attention', 'conv'])
def test_one_path_is_compared_with_what_it_has(mix, capsys, tmp_path):
    file = tmp_path / 'out.csv'
    option = f'model.backbone.mix={mix}'
    text = said(capsys, DEMO, '--shape', 64, '--by-layer', '--csv', file, '--cfg-options', option)
    assert ('plain convolutions' in text) == (mix == 'conv')
    assert ('self-attention alone' in text) == (mix == 'attention')
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert {bool(row['convolution projection flops']) for row in rows} == {mix == 'conv'}
    assert {bool(row['self_attention projection flops']) for row in rows} == {mix == 'attention'}


def test_network_without_mixed_operators(capsys, tmp_path):
    plain = 'demo/retinanet_r26_fpn_scene-digits.py'
    text = said(capsys, plain, '--shape', 64, '--by-layer', '--csv', tmp_path / 'out.csv')
    assert 'operators:  none is mixed\n\ntable: ' in text
    assert (tmp_path / 'out.csv').read_text() == 'operator\n'
    plot = tmp_path / 'out.png'
    arguments = [str(CONFIGS / plain), '--shape', '64', '--plot', str(plot)]
    assert 'has no mixed operators' in refusal(complexity.main, arguments)
    assert not plot.exists()


def test_no_size():
    with pytest.raises(SystemExit, match=r'error: cfg must have a test pipeline .* --shape H W'):
        complexity.main([str(CONFIGS / DEMO)])


@pytest.mark.parametrize('shape', [['0'], ['3', '4', '5']])
def test_wrong_shape(shape, capsys):
    with pytest.raises(SystemExit):
        complexity.parse_args(['config.py', '--shape', *shape])
    assert '--shape must be one or two positive integers, got' in capsys.readouterr().err
