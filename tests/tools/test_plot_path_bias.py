"""plot_path_bias.py: from checkpoints and logs of a small detector to a picture and a table."""

import json
import re

import plot_path_bias
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn

from acmix_mm.config_check import merge_options
from acmix_mm.weights import build

CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
OPTIONS = {'model.backbone.base_channels': 8, 'model.neck.in_channels': [32, 64, 128, 256]}
NARROW = ['--cfg-options', *(f'{k}={v}'.replace(' ', '') for k, v in OPTIONS.items())]


@pytest.fixture(scope='module')
def model(request):
    cfg = Config.fromfile(str(request.config.rootpath / CONFIG))
    merge_options(cfg, dict(OPTIONS))
    torch.manual_seed(0)
    return build(cfg)


@pytest.fixture
def checkpoint(model, tmp_path):
    """Writes a checkpoint with given rates in all operators."""

    def write(name: str, rate1: float, rate2: float):
        for parameter, value in model.named_parameters():
            if parameter.endswith('rate1'):
                nn.init.constant_(value, rate1)
            elif parameter.endswith('rate2'):
                nn.init.constant_(value, rate2)
        file = tmp_path / name
        torch.save({'state_dict': model.state_dict()}, file)
        return str(file)

    return write


def row(said: str, operator: str = 'backbone.layer1.0.conv2') -> list[str]:
    """The table's row for an operator."""
    return re.search(rf'^{re.escape(operator)}  +(.*)$', said, re.MULTILINE)[1].split()


def test_checkpoints_of_two_labels(checkpoint, tmp_path, capsys):
    files = [checkpoint('a.pth', 0.2, 0.8), checkpoint('b.pth', -0.4, 0.4)]
    files.append(checkpoint('c.pth', 1.0, 2.0))
    out = tmp_path / 'bias.png'
    labels = ['--labels', 'two', 'two', 'one']
    plot_path_bias.main([*files, *labels, '--out', str(out)])
    said = capsys.readouterr().out
    assert 'two, mean of 2 runs\n' in said
    first, second = said.split('\none\n')
    assert row(first) == ['0.300', '0.600', '-0.693']
    assert row(second) == ['1.000', '2.000', '-0.693']
    assert len(re.findall(r'^backbone\.', first, re.MULTILINE)) == 8
    assert f'picture: {out}' in said
    with Image.open(out) as picture:
        picture.load()
        assert picture.size[0] > 1000


def test_a_work_dir_with_a_log(tmp_path, capsys):
    file = tmp_path / 'run' / '20260101_000000' / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    line = {'path_bias_rate1/x': 0.25, 'path_bias_rate2/x': 0.5, 'path_bias_ratio/x': 0.5}
    file.write_text(f'{json.dumps({**line, "step": 5})}\n')
    plot_path_bias.main([str(tmp_path / 'run'), '--out', str(tmp_path / 'bias.png')])
    said = capsys.readouterr().out
    assert said.startswith(f'run: {file}\n')
    assert row(said, 'x') == ['0.250', '0.500', '-0.693']


def test_energies(checkpoint, scene_digits, tmp_path, capsys):
    """Without the weight of a path it has no energy."""
    images = sorted(map(str, (scene_digits / 'coco' / 'val2017').glob('*.jpg')))[:2]
    for rates, share in (((0.5, 0.0), '100.0%'), ((0.0, 0.5), '0.0%')):
        file, out = checkpoint('a.pth', *rates), str(tmp_path / 'bias.png')
        plot_path_bias.main([file, '--energy', CONFIG, *images, *NARROW, '--out', out])
        assert row(capsys.readouterr().out)[-1] == share


def test_energy_is_refused(checkpoint, tmp_path):
    file, out = checkpoint('a.pth', 1, 1), ['--out', str(tmp_path / 'bias.png')]
    log = tmp_path / 'scalars.json'
    log.write_text('{"path_bias_rate1/x": 1, "path_bias_rate2/x": 1}\n')
    for paths, energy, message in (
        ([file], [CONFIG, str(tmp_path / 'none.jpg'), *NARROW], r'none\.jpg cannot be read: is no'),
        ([file], ['configs/none.py', 'x.jpg'], r'config configs/none\.py does not exist'),
        ([file], [CONFIG, 'x.jpg'], r'a\.pth does not fit config .*: 205 of 330 weights have an'),
        ([str(log)], [CONFIG, 'x.jpg'], r'--energy needs checkpoints or work directories, got log'),
    ):
        with pytest.raises(SystemExit, match=f'error: .*{message}'):
            plot_path_bias.main([*paths, '--energy', *energy, *out])
    assert not (tmp_path / 'bias.png').exists()


def test_wrong_input(checkpoint, tmp_path, capsys):
    file, out = checkpoint('a.pth', 1, 1), tmp_path / 'bias.png'
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'plain.pth')
    other = tmp_path / 'other.pth'
    torch.save({'state_dict': {'x.rate1': torch.ones(1), 'x.rate2': torch.ones(1)}}, other)
    for arguments, message in (
        ([tmp_path / 'none.pth'], r'checkpoint .*none\.pth does not exist'),
        ([tmp_path / 'plain.pth'], r'checkpoint .*plain\.pth: weights must have learned rates'),
        ([file, other, '--labels', 'same'], 'runs of same must have the same mixed operators'),
    ):
        with pytest.raises(SystemExit, match=f'error: {message}'):
            plot_path_bias.main([*map(str, arguments), '--out', str(out)])
    with pytest.raises(SystemExit, match=r'error: folder .*none does not exist'):
        plot_path_bias.main([file, '--out', str(tmp_path / 'none' / 'bias.png')])
    capsys.readouterr()
    for arguments, message in (
        ([file, '--out', 'bias.jpg'], '--out: must end in .png, got bias.jpg'),
        ([file, '--labels', 'a', 'b', '--out', 'a.png'], '--labels: must be one, or one for each'),
        ([file, '--energy', CONFIG, '--out', 'a.png'], '--energy: must be a config and at least'),
        ([file], 'the following arguments are required: --out'),
    ):
        with pytest.raises(SystemExit):
            plot_path_bias.main(arguments)
        error = capsys.readouterr().err
        assert message in error
        assert error.count('\n') == 1
    assert not out.exists()


def test_picture_is_not_empty(checkpoint, tmp_path):
    """Lines, bands and text are there: many colours."""
    files = [checkpoint(f'{i}.pth', 0.5 + i / 10, 0.5) for i in range(3)]
    out = tmp_path / 'bias.png'
    plot_path_bias.main([*files, '--labels', 'x', '--spread', 'std', '--out', str(out)])
    with Image.open(out) as picture:
        assert len(picture.convert('RGB').getcolors(2**24)) > 50
