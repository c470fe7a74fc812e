"""visualize_attention.py: a small detector's attention, as pictures and as a page in a browser."""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import visualize_attention
from browser import attributes, content, open_page, table
from mmengine.config import Config
from PIL import Image

from acmix_mm.analysis.attention import Attention, attentions_of
from acmix_mm.analysis.images import Frame, ImageLoader
from acmix_mm.command_line import build_model
from acmix_mm.config_check import merge_options
from acmix_mm.weights import build

CONFIGS = {
    'detector': (
        'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py',
        {'model.backbone.base_channels': 8, 'model.neck.in_channels': [32, 64, 128, 256]},
    ),
    'segmentor': ('configs/demo/acmix-swin_upernet_scene-digits.py', {}),
}
POINTS = ('60,40', '0,95')


@dataclass
class Run:
    """What the program was given, and what it left."""

    config: str
    options: list[str]
    image: Path
    checkpoint: Path
    folder: Path
    attentions: dict[str, Attention]
    frame: Frame

    def arguments(self, *more: object) -> list[str]:
        return list(map(str, (self.image, self.config, self.checkpoint, *more, *self.options)))

    @property
    def page(self) -> Path:
        return self.folder / 'attention.html'


def make_run(name: str, scene_digits: Path, root: Path, *more: str) -> Run:
    config, options = CONFIGS[name]
    cfg = Config.fromfile(config)
    merge_options(cfg, dict(options))
    torch.manual_seed(0)
    model = build(cfg)
    for parameter in model.parameters():  # attention that is not nearly even
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    checkpoint = root / 'model.pth'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    image = sorted((scene_digits / 'coco' / 'val2017').glob('*.jpg'))[0]
    written = ['--cfg-options', *(f'{k}={v}'.replace(' ', '') for k, v in options.items())]
    run = Run(config, written if options else [], image, checkpoint, root / 'out', {}, None)
    model = build_model(
        cfg, torch.load(checkpoint), argparse.Namespace(config=config, checkpoint=checkpoint)
    )
    data, run.frame = ImageLoader(cfg, model).load(image)
    found = attentions_of(model, lambda: model.test_step(data))
    run.attentions = {attention.name: attention for attention in found}
    arguments = run.arguments('--points', *POINTS, '--out-dir', run.folder, *more)
    visualize_attention.main(arguments)
    return run


@pytest.fixture(scope='module')
def run(scene_digits, tmp_path_factory):
    """The detector's run, with the default layers."""
    return make_run('detector', scene_digits, tmp_path_factory.mktemp('attention'))


def data_of(page: Path) -> dict:
    text = page.read_text()
    start = text.index('type="application/json">') + len('type="application/json">')
    return json.loads(text[start : text.index('</script>', start)])


def test_files(run):
    names = {'attention.html', 'attention_x0_y95.png', 'attention_x60_y40.png', 'paths.png',
             'shift_kernels.png'}  # fmt: skip
    assert {file.name for file in run.folder.iterdir()} == names
    for file in run.folder.glob('*.png'):
        with Image.open(file) as picture:
            assert len(picture.convert('RGB').getcolors(2**24)) > 50
    assert run.page.stat().st_size < 10e6


def test_page_has_the_last_layer_of_each_stage(run):
    names = [layer['name'] for layer in data_of(run.page)['layers']]
    stages = ('layer1.0', 'layer2.1', 'layer3.3', 'layer4.0')
    assert names == [f'backbone.{stage}.conv2' for stage in stages]
    assert data_of(run.page)['extent'].startswith('4 of the 8 mixed operators')
    assert all(layer['step'] == 1 for layer in data_of(run.page)['layers'])


def test_layers_by_name(run, tmp_path, capsys):
    names = ['backbone.layer4.0.conv2', 'backbone.layer2.0.conv2']
    arguments = ['--points', '5,5', '--layers', *names, '--out-dir', tmp_path / 'a' / 'b']
    visualize_attention.main(run.arguments(*arguments))
    page = tmp_path / 'a' / 'b' / 'attention.html'
    assert [layer['name'] for layer in data_of(page)['layers']] == names[::-1]
    said = capsys.readouterr().out
    assert f'page:     {page}' in said
    assert 'not shown: backbone.layer1.0.conv2' in said


def test_wrong_input(run, tmp_path, capsys):
    out = ['--out-dir', tmp_path / 'out']
    point = ['--points', '5,5']
    broken = tmp_path / 'broken.jpg'
    broken.write_bytes(run.image.read_bytes()[:1000])
    own = tmp_path / 'paths.png'
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(own)
    deployed = tmp_path / 'deployed.pth'
    plain = 'configs/demo/retinanet_r26_fpn_scene-digits.py'
    for change, arguments, message in (
        ({}, ['--points', '96,0', *out], 'point 96,0 must be in the image, x from 0 to 95 and y'),
        ({}, ['--points', '5,5', '3,200', *out], 'point 3,200 must be in the image'),
        ({'image': tmp_path / 'none.jpg'}, [*point, *out], r'none\.jpg cannot be read: is no file'),
        ({'image': broken}, [*point, *out], r'broken\.jpg cannot be read: image file is truncated'),
        ({'image': own}, [*point, '--out-dir', tmp_path], r'paths\.png would be overwritten'),
        ({}, [*point, '--layers', 'layer9', *out], r'layers must be of backbone\.layer1\.0\.conv2'),
        ({}, [*point, '--out-dir', own / 'x'], r'folder .*paths\.png is none'),
        ({'checkpoint': deployed}, [*point, *out], r'deployed\.pth does not exist'),
        ({'config': 'configs/none.py'}, [*point, *out], r'config configs/none\.py does not exist'),
        ({'config': plain}, [*point, *out], 'model.pth does not fit config'),
    ):
        changed = Run(**{**vars(run), **change})
        with pytest.raises(SystemExit, match=f'error: .*{message}'):
            visualize_attention.main(changed.arguments(*arguments))
        assert not (tmp_path / 'out').exists()
    capsys.readouterr()
    for points in (['5'], ['5,'], ['-5,5'], ['a,b'], ['1.5,2'], []):
        with pytest.raises(SystemExit):
            visualize_attention.main(run.arguments('--points', *points, *out))
        error = capsys.readouterr().err
        assert error.startswith('error: ')
        assert error.count('\n') == 1
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('plain', [True, False])
def test_models_that_do_not_serve(run, tmp_path, plain):
    """Plain ones, and deployed ones."""
    config, options = CONFIGS['detector']
    if plain:
        config = 'configs/demo/retinanet_r26_fpn_scene-digits.py'
        message = 'model must have operators that mix attention and convolution, RetinaNet has none'
    else:
        options = {**options, 'model.backbone.deploy': True}
        message = r'model must be as it is trained: backbone\.layer1\.0\.conv2 is deployed'
    cfg = Config.fromfile(config)
    merge_options(cfg, dict(options))
    checkpoint = tmp_path / 'model.pth'
    torch.save({'state_dict': build(cfg).state_dict()}, checkpoint)
    written = ['--cfg-options', *(f'{k}={v}'.replace(' ', '') for k, v in options.items())]
    changed = Run(**{**vars(run), 'config': config, 'checkpoint': checkpoint, 'options': written})
    with pytest.raises(SystemExit, match=f'error: {message}'):
        visualize_attention.main(
            changed.arguments('--points', '5,5', '--out-dir', tmp_path / 'out')
        )
    assert not (tmp_path / 'out').exists()


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_folder_that_is_read_only(run, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match=r'error: folder .* cannot be written to'):
        visualize_attention.main(run.arguments('--points', '5,5', '--out-dir', tmp_path / 'out'))


# In a browser.


def expected_table(
    run: Run, name: str, point: tuple[int, int], head: int | None
) -> tuple[np.ndarray, list[int]]:
    """Weights of the position of a pixel, arranged as the keys are, and the position."""
    attention = run.attentions[name]
    query = torch.tensor([run.frame.cell(*point, attention.query_size)])
    weights = attention.weights(query)[0]
    weights = weights.mean(0) if head is None else weights[head]
    return weights.view(attention.grid).numpy(), query[0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('layer', 'head', 'point'),
    [
        ('layer1.0', None, (60, 40)),
        ('layer2.1', 2, (95, 0)),
        ('layer4.0', 0, (33, 95)),  # with stride 2
    ],
)
def test_page_shows_the_chosen_pixel(run, layer, head, point):
    name = f'backbone.{layer}.conv2'
    fragment = f'layer={name}&head={"mean" if head is None else head + 1}&x={point[0]}&y={point[1]}'
    page = open_page(run.page, fragment)
    weights, query = expected_table(run, name, point, head)
    shown = attributes(page, 'status')
    assert (shown['data-layer'], shown['data-row'], shown['data-column']) == (
        name,
        *map(str, query),
    )
    assert shown['data-head'] == ('mean' if head is None else str(head + 1))
    assert f'Pixel x = {point[0]}, y = {point[1]}: row {query[0]}, column' in content(
        page, 'status'
    )
    np.testing.assert_allclose(table(page, 'numbers'), weights, rtol=0, atol=weights.max() / 200)


ACTIONS = """
const area = picture.getBoundingClientRect();
const at = (kind, x, y) => new PointerEvent(kind, {bubbles: true,
  clientX: area.left + (x + 0.5) / data.width * area.width,
  clientY: area.top + (y + 0.5) / data.height * area.height});
const seen = [];
const look = () => {
  const shown = element('status').dataset;
  seen.push([Number(shown.row), Number(shown.column), location.hash]);
};
picture.dispatchEvent(at('pointermove', 70, 20)); look();
picture.dispatchEvent(at('click', 60, 40)); look();
picture.dispatchEvent(at('pointermove', 5, 5)); look();
picture.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true})); look();
picture.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowUp', bubbles: true})); look();
picture.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}));
element('layer').value = 1; element('layer').dispatchEvent(new Event('change')); look();
report(seen);
"""


@pytest.mark.slow
def test_page_follows_pointer_and_keys(run):
    """Hover, click, hover again, arrows, another layer; cells of 4 pixels, then of 8."""
    page = open_page(run.page, script=ACTIONS)
    hover, click, kept, right, up, other = json.loads(content(page, 'report'))
    assert hover[:2] == [5, 17]
    assert click[:2] == kept[:2] == [10, 15]
    assert click[2] == '#layer=backbone.layer1.0.conv2&head=mean&x=60&y=40'
    assert right[:2] == [10, 16]
    assert up[:2] == [9, 16]
    assert other[:2] == [4, 8]
    shown = attributes(page, 'status')
    assert shown['data-layer'] == 'backbone.layer2.1.conv2'
    name = shown['data-layer']
    weights, _ = expected_table(run, name, (66, 38), None)
    np.testing.assert_allclose(table(page, 'numbers'), weights, rtol=0, atol=weights.max() / 200)


@pytest.mark.slow
def test_page_of_a_segmentor(scene_digits, tmp_path):
    """Swin: shifted windows on padded maps; all layers."""
    run = make_run('segmentor', scene_digits, tmp_path, '--layers', 'all')
    for name in list(run.attentions)[:2]:
        page = open_page(run.page, f'layer={name}&head=1&x=90&y=3')
        weights, query = expected_table(run, name, (90, 3), 0)
        shown = attributes(page, 'status')
        assert [int(shown[f'data-{k}']) for k in ('row', 'column')] == query
        np.testing.assert_allclose(
            table(page, 'numbers'), weights, rtol=0, atol=weights.max() / 200
        )
