"""Images that are damaged, strange or none, and how predict.py ends on them, for every task."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import predict
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from acmix_mm.files import claim

pytestmark = pytest.mark.slow

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


def check_sizes(task: Task, entry: dict, size: tuple[int, int], out: Path) -> None:
    """As the image's; but a segmentor's are enlarged, with a legend below, as wide as its words."""
    drawn = Image.open(out / entry['picture']).size
    if task.name == 'segmentor':
        assert Image.open(out / entry['label_map']).size == size
        factor = max(1, math.ceil(320 / max(size)))
        assert factor * size[0] <= drawn[0] <= max(factor * size[0], 150)
        assert factor * size[1] <= drawn[1] <= factor * size[1] + 250
    else:
        assert drawn == size


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
    """Read, predicted, and drawn."""
    name, make = UNUSUAL[case]
    make(tmp_path / name)
    code, entries = task.run(tmp_path, tmp_path / 'out')
    assert code is None
    assert [entry['image'] for entry in entries] == [name]
    check_sizes(task, entries[0], Image.open(tmp_path / name).size, tmp_path / 'out')
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, {case}')


def test_exif_orientation(task, tmp_path, campaign):
    """What is predicted is that of the image as it is shown, and so is the picture drawn."""
    folder, exif = tmp_path / 'in', Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save(folder / 'a.jpg', exif=exif, quality=95)
    pixels = np.asarray(Image.open(folder / 'a.jpg'))
    save(folder / 'b.png', np.rot90(pixels, -1))
    code, (turned, upright) = task.run(folder, tmp_path / 'out', '--score-thr', '0')
    assert code is None
    key = 'shares' if task.name == 'segmentor' else 'predictions'
    assert turned[key]
    assert turned[key] == upright[key]
    for entry in (turned, upright):
        check_sizes(task, entry, (40, 52), tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, EXIF orientation')


@pytest.mark.parametrize('shape', [(4, 1200), (1200, 4)])
def test_huge_aspect_ratio(task, shape, tmp_path, campaign):
    """Predicted, or reported where the pipeline leaves less than a pixel of it."""
    save(tmp_path / 'x.png', picture(*shape))
    save(tmp_path / 'y.png')
    code, entries = task.run(tmp_path, tmp_path / 'out', '--batch-size', '2')
    assert 'error' not in entries[1]
    assert (code is None) == ('error' not in entries[0])
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, {shape[1]}x{shape[0]} pixels')


def test_formats_outside_of_folders(task, tmp_path, campaign):
    """A GIF is predicted where OpenCV reads it, and its picture is a PNG; a folder has none."""
    save(tmp_path / 'x.gif')
    code, entries = task.run(tmp_path / 'x.gif', tmp_path / 'out')
    if code is None:
        assert entries[0]['picture'].endswith('.png')
        check_files(task, entries, tmp_path / 'out')
    else:
        assert 'x.gif' in code
    code, _ = task.run(tmp_path, tmp_path / 'none')
    assert 'must hold images' in code
    campaign(CAMPAIGN, f'{task.name}, GIF')


def test_images_of_one_stem(task, tmp_path, campaign):
    """Each has its own outputs."""
    folder = tmp_path / 'in'
    folder.mkdir()
    names = ['a.bmp', 'a.jpg', 'a.jpg.png', 'a.png', 'b.png']
    for i, name in enumerate(names):
        save(folder / name, picture(40 + i, 52))
    code, entries = task.run(folder, tmp_path / 'out', '--batch-size', '2')
    assert code is None
    assert [entry['image'] for entry in entries] == names
    check_files(task, entries, tmp_path / 'out')
    for i, entry in enumerate(entries):
        check_sizes(task, entry, (52, 40 + i), tmp_path / 'out')
    code, entries = task.run(folder / 'a.png', tmp_path / 'one')
    if task.name == 'segmentor':
        assert entries[0]['label_map'] == 'label_maps/a.png'
    campaign(CAMPAIGN, f'{task.name}, images of one stem')


@pytest.mark.parametrize('case', ['vis', 'label_maps', 'link to vis', 'images linked from vis'])
def test_images_are_not_overwritten(task, case, tmp_path, campaign):
    out, source = tmp_path / 'out', tmp_path / 'out' / case
    if case == 'link to vis':
        (out / 'vis').mkdir(parents=True)
        source.symlink_to('vis')
    else:
        source.mkdir(parents=True)
    save(source / 'a.png')
    if case == 'images linked from vis':
        (out / 'vis').mkdir()
        (source / 'a.png').rename(out / 'vis' / 'a.png')
        (source / 'a.png').symlink_to('../vis/a.png')
    content = (source / 'a.png').read_bytes()
    for given in (source, source / 'a.png'):
        code, _ = task.run(given, out)
        assert code.startswith(f'error: --out-dir {out}: what is written to ')
        assert (source / 'a.png').read_bytes() == content
    assert not (out / 'predictions.json').exists()
    campaign(CAMPAIGN, f'{task.name}, input in {case}')


def test_images_in_the_output_folder_itself(task, tmp_path, campaign):
    save(tmp_path / 'a.png')
    content = (tmp_path / 'a.png').read_bytes()
    for _ in range(2):
        code, entries = task.run(tmp_path, tmp_path)
        assert code is None
        assert len(entries) == 1
    assert (tmp_path / 'a.png').read_bytes() == content
    campaign(CAMPAIGN, f'{task.name}, input is the output folder')


def test_batches_of_different_sizes(task, tmp_path, campaign):
    """Of a segmentor and of a classifier the same as one by one."""
    for i, name in enumerate('abcde'):
        save(tmp_path / f'{name}.png', picture(40 + 8 * (i % 2), 52))
    together, alone = (
        task.run(tmp_path, tmp_path / size, '--batch-size', size) for size in ('4', '1')
    )
    assert together[0] is alone[0] is None
    assert [e['image'] for e in together[1]] == [e['image'] for e in alone[1]]
    if task.name == 'segmentor':
        for one, other in zip(together[1], alone[1], strict=True):
            ours, theirs = (
                np.asarray(Image.open(tmp_path / folder / entry['label_map']))
                for folder, entry in (('4', one), ('1', other))
            )
            np.testing.assert_array_equal(ours, theirs)
    campaign(CAMPAIGN, f'{task.name}, batches of different sizes')


def test_model_that_fails_for_one_of_a_batch(task, tmp_path, monkeypatch, campaign):
    """The others of its batch are predicted."""
    for i, name in enumerate('abc'):
        save(tmp_path / f'{name}.png', picture()[: 40 - 4 * (i == 1)])
    kinds = (predict.Detector, predict.Segmentor, predict.Classifier)
    original = {kind: kind.forward for kind in kinds}

    def fail(self, data):
        if any(sample['data_samples'].ori_shape[0] == 36 for sample in data):
            raise RuntimeError('no memory for this')
        return original[type(self)](self, data)

    for kind in kinds:
        monkeypatch.setattr(kind, 'forward', fail)
    code, entries = task.run(tmp_path, tmp_path / 'out', '--batch-size', '3')
    assert code.startswith('error: 1 of 3 images could not be predicted: b.png')
    assert [entry.get('error') for entry in entries] == [None, 'no memory for this', None]
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, a model that fails for one of a batch')


def test_interrupted(task, tmp_path, monkeypatch, campaign):
    """The JSON has what is done, which is whole."""
    for name in 'abc':
        save(tmp_path / f'{name}.png')
    load = predict.check_image

    def interrupt(image):
        if image.name == 'c.png':
            raise KeyboardInterrupt
        load(image)

    monkeypatch.setattr(predict, 'check_image', interrupt)
    code, entries = task.run(tmp_path, tmp_path / 'out')
    assert code == 130
    assert [entry['image'] for entry in entries] == ['a.png', 'b.png']
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, interrupted')


def test_two_at_once(task, tmp_path, campaign):
    save(tmp_path / 'a.png')
    (tmp_path / 'out').mkdir()
    with claim(tmp_path / 'out'):
        code, entries = task.run(tmp_path, tmp_path / 'out')
    assert f'folder {tmp_path / "out"} is in use by process {os.getpid()}' in code
    assert not entries
    campaign(CAMPAIGN, f'{task.name}, two at once')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read all files')
def test_without_permission(task, tmp_path, campaign):
    for name in 'ab':
        save(tmp_path / f'{name}.png')
    (tmp_path / 'a.png').chmod(0)
    code, entries = task.run(tmp_path, tmp_path / 'out')
    assert code.startswith('error: 1 of 2 images could not be predicted: a.png')
    assert entries[0]['error'] == 'Permission denied'
    campaign(CAMPAIGN, f'{task.name}, without permission')


ARGUMENTS = {
    'no such input': ('none', [], 'none does not exist or is no folder'),
    'empty folder': ('empty', [], 'must hold images'),
    'no such GPU': ('a.png', ['--device', 'cuda:99'], r"argument --device: 'cuda:99'"),
    'no such kind of device': ('a.png', ['--device', 'gpu'], "'gpu' is not cpu, cuda or cuda:N"),
    'no such CPU': ('a.png', ['--device', 'cpu:3'], "'cpu:3' is not cpu, cuda or cuda:N"),
    'no images at a time': ('a.png', ['--batch-size', '0'], 'batch-size must be at least 1, got 0'),
    'batches of words': ('a.png', ['--batch-size', 'x'], "argument --batch-size: invalid .*'x'"),
    'no images at all': ('a.png', ['--limit', '0'], '--limit must be at least 1, got 0'),
    'score above 1': ('a.png', ['--score-thr', '1.5'], 'score-thr must be between 0 and 1'),
    'score that is no number': ('a.png', ['--score-thr', 'nan'], 'between 0 and 1, got nan'),
}


@pytest.mark.parametrize('case', ARGUMENTS)
def test_wrong_arguments(task, case, tmp_path, capsys, campaign):
    name, more, message = ARGUMENTS[case]
    save(tmp_path / 'a.png')
    (tmp_path / 'empty').mkdir()
    code, _ = task.run(tmp_path / name, tmp_path / 'out', *more)
    said = code if isinstance(code, str) else capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, said)
    assert 'error: ' in said
    assert not (tmp_path / 'out').exists()
    campaign(CAMPAIGN, f'{task.name}, {case}')


@pytest.mark.parametrize('place', ['file', 'file/below', 'file/vis/below'])
def test_output_folder_that_is_a_file(task, place, tmp_path, campaign):
    save(tmp_path / 'a.png')
    (tmp_path / 'file').touch()
    code, _ = task.run(tmp_path / 'a.png', tmp_path / place)
    assert code == f'error: folder {tmp_path / "file"} is none'
    assert (tmp_path / 'file').read_bytes() == b''
    campaign(CAMPAIGN, f'{task.name}, --out-dir {place}')


@pytest.mark.parametrize('classes', [None, ('cat', 'dog'), tuple(map(str, range(80)))])
def test_classes_that_are_not_the_models(task, classes, tmp_path, campaign):
    """Names of another data set would be wrong, and of fewer classes too few."""
    save(tmp_path / 'a.png')
    state = torch.load(task.checkpoint, weights_only=True)
    state['meta'] = {'dataset_meta': {'classes': classes}} if classes else {}
    other = Task.__new__(Task)
    other.__dict__.update(vars(task), inferencer=None, checkpoint=tmp_path / 'other.pth')
    torch.save(state, other.checkpoint)
    code, _ = other.run(tmp_path / 'a.png', tmp_path / 'out')
    assert re.search(rf'other\.pth must name the classes .* has {len(CLASSES[task.name])}$', code)
    assert not (tmp_path / 'out').exists()
    campaign(CAMPAIGN, f'{task.name}, {len(classes or ())} classes')


def test_terminated(task, tmp_path, pytestconfig, campaign):
    """SIGTERM, which schedulers send, ends it in a line, with what is done in the JSON."""
    folder = tmp_path / 'in'
    folder.mkdir()
    for i in range(300):
        save(folder / f'{i:03d}.png')
    arguments = task.arguments(folder, tmp_path / 'out', '--device', 'cpu')
    process = subprocess.Popen(
        [sys.executable, pytestconfig.rootpath / 'tools' / 'predict.py', *arguments],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while not list((tmp_path / 'out').glob('vis/0*')) and process.poll() is None:
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == 'interrupted'
    entries = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert 0 < len(entries) < 300
    check_files(task, entries, tmp_path / 'out')
    campaign(CAMPAIGN, f'{task.name}, terminated')
