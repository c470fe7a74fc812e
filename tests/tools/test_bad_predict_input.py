"""Images that are damaged, strange or none, and how predict.py ends on them, for every task."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import predict
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

CAMPAIGN = 'bad input of predict'
CONFIGS = {
    'detector': 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py',
    'segmentor': 'configs/demo/acmix-pvt_fpn_scene-digits.py',
    'classifier': 'configs/demo/acmix-r26_scene-digits.py',
}
OPTIONS = {
    'detector': {'model.test_cfg.rcnn.score_thr': 0.0, 'model.test_cfg.rcnn.max_per_img': 3},
    'segmentor': {},
    'classifier': {'model.backbone.base_channels': 8, 'model.head.in_channels': 256},
}
CLASSES = {
    'detector': tuple('0123456789'),
    'segmentor': ('background', *'0123456789'),
    'classifier': tuple('0123456789'),
}


class Task:
    """A model with random weights, and the program on it; the model is built once."""

    def __init__(self, name: str, folder: Path):
        self.name, self.config, self.checkpoint = name, CONFIGS[name], folder / f'{name}.pth'
        self.options = [f'{key}={value}' for key, value in OPTIONS[name].items()]
        torch.manual_seed(0)
        cfg = Config.fromfile(self.config)
        cfg.merge_from_dict(OPTIONS[name])
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        model.init_weights()
        meta = {'dataset_meta': {'classes': CLASSES[name]}}
        if name == 'segmentor':
            meta['dataset_meta']['palette'] = [[20 * i, 0, 0] for i in range(11)]
        torch.save({'state_dict': model.state_dict(), 'meta': meta}, self.checkpoint)
        self.inferencer = None

    def arguments(self, source: Path, out: Path, *more: str) -> list[str]:
        options = ['--cfg-options', *self.options] if self.options else []
        return [
            str(source), self.config, str(self.checkpoint), '--out-dir', str(out), *more, *options
        ]  # fmt: skip

    def run(self, source: Path, out: Path, *more: str) -> tuple[object, list[dict]]:
        """What the program ends with, None for success, and the entries of its JSON."""

        def build(*arguments):
            self.inferencer = self.inferencer or BUILD(*arguments)
            return self.inferencer

        code = None
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(predict, 'build_inferencer', build)
            try:
                more = more if '--device' in more else (*more, '--device', 'cpu')
                predict.main(self.arguments(source, out, *more))
            except SystemExit as stop:
                code = stop.code
        file = out / 'predictions.json'
        return code, json.loads(file.read_text()) if file.exists() else []


BUILD = predict.build_inferencer


@pytest.fixture(scope='module', params=CONFIGS)
def task(request, tmp_path_factory) -> Task:
    if request.param == 'classifier':
        pytest.importorskip('mmpretrain')
    return Task(request.param, tmp_path_factory.mktemp('models'))


def picture(height: int = 40, width: int = 52, channels: int = 3) -> np.ndarray:
    """Noise with a bright corner at the top left."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 200, (height, width, channels), np.uint8)
    image[: height // 4, : width // 4] = 255
    return image


def save(file: Path, array: np.ndarray | None = None, mode: str | None = None, **options) -> None:
    image = Image.fromarray(picture() if array is None else array)
    (image if mode is None else image.convert(mode)).save(file, **options)


def cut(file: Path, keep: float) -> None:
    """Leave the first part of a file."""
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def truncated(file: Path) -> None:
    save(file)
    cut(file, 0.6)


def flipped_bytes(file: Path) -> None:
    """A PNG whose data are damaged in the middle."""
    save(file)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    file.write_bytes(content)


# How to make what is no picture, by a name for the case: the file's name and what to do.
UNREADABLE = {
    'empty file': ('x.jpg', Path.touch, 'the file is empty'),
    'text': ('x.png', lambda f: f.write_text('no picture'), 'is no picture'),
    'one byte': ('x.jpg', lambda f: f.write_bytes(b'\xff'), 'is no picture'),
    'folder': ('x.jpg', Path.mkdir, 'is a folder'),
    'broken link': ('x.png', lambda f: f.symlink_to('nowhere.png'), 'is no file'),
    'link to itself': ('x.png', lambda f: f.symlink_to(f.name), 'is no file'),
    'named pipe': ('x.jpg', os.mkfifo, 'is no file'),
    'truncated JPEG': ('x.jpg', truncated, 'truncated'),
    'truncated PNG': ('x.png', truncated, 'truncated'),
    'truncated BMP': ('x.bmp', truncated, 'truncated'),
    'truncated TIFF': ('x.tif', truncated, ''),
    'truncated WebP': ('x.webp', truncated, ''),
    'only a header': ('x.jpg', lambda f: (save(f), cut(f, 0.02)), ''),
    'damaged PNG': ('x.png', flipped_bytes, ''),
    'JSON named .jpg': ('x.jpg', lambda f: f.write_text('{"image": 1}'), 'is no picture'),
    'PDF named .png': ('x.png', lambda f: f.write_bytes(b'%PDF-1.7\n' + bytes(99)), 'no picture'),
    'HTML page of a failed download': (
        'x.jpeg', lambda f: f.write_text('<!DOCTYPE html><html>404</html>'), 'is no picture'
    ),
    'zeros of the right length': ('x.jpg', lambda f: f.write_bytes(bytes(5000)), 'is no picture'),
}  # fmt: skip


@pytest.mark.parametrize('case', UNREADABLE)
def test_damaged_among_others(task, case, tmp_path, capfd, campaign):
    """It is reported, with its entry; the others of its batch have all that they should have."""
    folder = tmp_path / 'in'
    folder.mkdir()
    name, make, message = UNREADABLE[case]
    make(folder / name)
    for good in ('a.png', 'b.png', 'y.png'):
        save(folder / good)
    code, entries = task.run(folder, tmp_path / 'out', '--batch-size', '4')
    assert code == (
        f'error: 1 of 4 images could not be predicted: {name}; '
        f'{tmp_path / "out" / "predictions.json"} says why'
    )
    assert [entry['image'] for entry in entries] == ['a.png', 'b.png', name, 'y.png']
    for entry in entries:
        assert ('error' in entry) == (entry['image'] == name)
    assert message in entries[2]['error']
    assert '\n' not in entries[2]['error']
    lines = capfd.readouterr().err.splitlines()
    assert any(f'{name}: {entries[2]["error"]}' in line for line in lines)
    assert not any('Traceback' in line for line in lines)
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, {case}')


def check_files(task: Task, entries: list[dict], out: Path) -> None:
    """Every file that an entry names is there, whole, and there are no others."""
    named = set()
    for entry in entries:
        for key in {'picture', 'label_map'} & entry.keys():
            assert Image.open(out / entry[key]).size[0] > 0
            named.add(entry[key])
    wanted = sum('error' not in entry for entry in entries)
    assert len(named) == wanted * (2 if task.name == 'segmentor' else 1)
    there = {str(f.relative_to(out)) for f in out.rglob('*') if f.is_file()}
    assert there == named | {'predictions.json', '.lock'}


@pytest.mark.parametrize('case', UNREADABLE)
def test_damaged_alone(task, case, tmp_path, campaign):
    """One line, before any work."""
    name, make, message = UNREADABLE[case]
    make(tmp_path / name)
    source = tmp_path / name
    if not source.is_file():  # a file that is none cannot be named; its folder can
        source = tmp_path
    code, _ = task.run(source, tmp_path / 'out')
    assert code.startswith(f'error: {tmp_path / name}: ')
    assert message in code
    assert '\n' not in code
    assert not (tmp_path / 'out').exists()
    campaign(CAMPAIGN, f'{task.name}, alone: {case}')


def cmyk(file: Path) -> None:
    save(file, mode='CMYK')


def grey16(file: Path) -> None:
    cv2.imwrite(str(file), picture()[..., 0].astype(np.uint16) * 257)


# Pictures that are unusual, and have to be predicted.
UNUSUAL = {
    'grey': ('x.png', lambda f: save(f, mode='L')),
    'one bit': ('x.png', lambda f: save(f, mode='1')),
    'palette': ('x.png', lambda f: save(f, mode='P')),
    'with alpha': ('x.png', lambda f: save(f, mode='RGBA')),
    'grey with alpha': ('x.png', lambda f: save(f, mode='LA')),
    'CMYK': ('x.jpg', cmyk),
    '16-bit grey': ('x.png', grey16),
    '16-bit TIFF': ('x.tif', lambda f: cv2.imwrite(str(f), picture().astype(np.uint16) * 257)),
    'progressive': ('x.jpg', lambda f: save(f, progressive=True)),
    'WebP': ('x.webp', save),
    'PPM': ('x.ppm', save),
    'upper-case suffix': ('X.JPG', save),
    'wrong suffix': ('x.jpg', lambda f: save(f, format='PNG')),
    'one pixel': ('x.png', lambda f: save(f, picture(1, 1))),
    'one pixel wide': ('x.png', lambda f: save(f, picture(40, 1))),
    'one pixel high': ('x.png', lambda f: save(f, picture(1, 40))),
    'space in its name': ('x y.jpg', save),
    'not ASCII': ('Übung 図.png', save),
    'line break in its name': ('x\ny.png', save),
    'quotes and dollar': ('x"\'$HOME`.png', save),
    'leading dash': ('-x.png', save),
    'long name': ('x' * 246 + '.png', save),
}


@pytest.mark.parametrize('case', UNUSUAL)
def test_unusual_pictures(task, case, tmp_path, campaign):
    """Read, predicted, and drawn at their size."""
    name, make = UNUSUAL[case]
    make(tmp_path / name)
    code, entries = task.run(tmp_path, tmp_path / 'out')
    assert code is None
    assert [entry['image'] for entry in entries] == [name]
    size = Image.open(tmp_path / name).size
    drawn = Image.open(tmp_path / 'out' / entries[0]['picture'])
    assert drawn.size == size
    if task.name == 'segmentor':
        assert Image.open(tmp_path / 'out' / entries[0]['label_map']).size == size
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, {case}')
