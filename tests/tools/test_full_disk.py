"""Programs whose outputs do not fit on the disk: one line, nothing half written, nothing lost."""

import filecmp
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from programs import program

pytestmark = pytest.mark.slow

CAMPAIGN = 'full disks'
CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
SEGMENTOR = 'configs/demo/acmix-pvt_fpn_scene-digits.py'
NARROW = ['model.backbone.base_channels=8', 'model.neck.in_channels=[32,64,128,256]']
# The disk is a small file system in memory, in namespaces of the process and its children alone.
# What is on it at the end is copied away, by names that do not hide anything.
SCRIPT = """
set -e
disk=$1 size=$2 before=$3 after=$4
shift 4
mount -t tmpfs -o size=$size tmpfs "$disk"
cp -a "$before/." "$disk"
code=0
"$@" || code=$?
cp -a "$disk/." "$after"
exit $code
"""


@dataclass
class Outcome:
    """What a program with a full disk left.

    Args:
        code (int): Its exit code.
        errors (list[str]): What it said on standard error, without progress bars.
        new (set[str]): Files, by their paths on the disk, that were not there before.
        changed (set[str]): Files that are gone or not what they were.
    """

    code: int
    errors: list[str]
    new: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)

    @property
    def error(self) -> str:
        """The line with the error, without its prefix."""
        (line,) = [line for line in self.errors if line.startswith('error: ')]
        return line.removeprefix('error: ')


class Disk:
    """A disk of a few kB for one run of a program; ``before`` is what is on it at the start."""

    def __init__(self, folder: Path):
        self.place, self.before, self.after = (folder / n for n in ('disk', 'before', 'after'))
        for path in (self.place, self.before, self.after):
            path.mkdir()

    def run(self, size: str, name: str, *arguments: object) -> Outcome:
        """Run a program of tools/, whose arguments are on the disk where they say so."""
        command = [sys.executable, f'tools/{name}.py', *map(str, arguments)]
        places = [self.place, size, self.before, self.after]
        result = subprocess.run(
            ['unshare', '-rm', 'sh', '-c', SCRIPT, 'sh', *map(str, places), *command],
            capture_output=True,
            text=True,
        )
        before, after = (
            {str(f.relative_to(root)) for f in root.rglob('*') if f.is_file()}
            for root in (self.before, self.after)
        )
        kept = filecmp.cmpfiles(self.before, self.after, before, shallow=False)[0]
        lines = result.stderr.replace('\r', '\n').splitlines()
        return Outcome(result.returncode, lines, after - before, before - set(kept))


@pytest.fixture
def disk(tmp_path) -> Disk:
    probe = ['unshare', '-rm', 'sh', '-c', f'mount -t tmpfs -o size=4k tmpfs {tmp_path}']
    if shutil.which('unshare') is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip('this system lets nobody mount a file system in namespaces of their own')
    return Disk(tmp_path)


def check(outcome: Outcome, file: Path | str) -> None:
    """One line names what did not fit; what was there is as it was, and nothing hidden is left."""
    assert outcome.code == 1, outcome.errors
    said = [line for line in outcome.errors if 'error' in line.lower()]
    assert said == [f'error: {file}: No space left on device']
    assert not any('Traceback' in line for line in outcome.errors)
    assert not outcome.changed
    assert not [name for name in outcome.new if Path(name).name.startswith('.part-')]


def build(config: str, options: list[str], file: Path, classes: tuple[str, ...]) -> None:
    """The checkpoint of a model with random weights."""
    cfg = Config.fromfile(config)
    keys = dict(option.split('=') for option in options)
    cfg.merge_from_dict({k: json.loads(v) for k, v in keys.items()})
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    meta = {'dataset_meta': {'classes': classes}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, file)


@pytest.fixture(scope='module')
def detector(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp('detector') / 'detector.pth'
    build(CONFIG, NARROW, file, tuple('0123456789'))
    return file


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp('segmentor') / 'segmentor.pth'
    build(SEGMENTOR, [], file, ('background', *'0123456789'))
    return file


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """Twelve pictures of noise, of about 15 kB each."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for i in range(12):
        image = rng.integers(0, 256, (64, 80, 3), np.uint8)
        Image.fromarray(image).save(folder / f'{i:02d}.png')
    return folder


def test_predict(disk, detector, pictures, campaign):
    """Pictures that fitted are whole, and those of an earlier run."""
    (disk.before / 'vis').mkdir()
    shutil.copy(pictures / '00.png', disk.before / 'vis' / 'earlier.png')
    outcome = disk.run(
        '128k', 'predict', pictures, CONFIG, detector, '--out-dir', disk.place,
        '--device', 'cpu', '--cfg-options', *NARROW,
    )  # fmt: skip
    drawn = sorted(n for n in outcome.new if n.startswith('vis/'))
    assert 2 < len(drawn) < 12
    for name in drawn:
        Image.open(disk.after / name).load()
    assert outcome.new <= {*drawn, '.lock', 'predictions.json'}
    failed = f'{disk.place}/vis/{len(drawn):02d}.png'
    check(outcome, failed if failed in outcome.error else disk.place / 'predictions.json')
    campaign(CAMPAIGN, 'predict.py, pictures of a detector')


def test_predict_label_maps(disk, segmentor, pictures, campaign):
    earlier = [{'image': 'earlier.png'}] * 100
    (disk.before / 'predictions.json').write_text(json.dumps(earlier))
    outcome = disk.run(
        '60k', 'predict', pictures, SEGMENTOR, segmentor, '--out-dir', disk.place,
        '--device', 'cpu',
    )  # fmt: skip
    for name in outcome.new - {'.lock'}:
        Image.open(disk.after / name).load()
    file = outcome.error.partition(': No space')[0]
    assert Path(file).parent.name in ('vis', 'label_maps') or file.endswith('predictions.json')
    outcome.changed -= {'predictions.json'}  # of the images that are done
    json.loads((disk.after / 'predictions.json').read_text())
    check(outcome, file)
    campaign(CAMPAIGN, 'predict.py, label maps of a segmentor')


def test_out_of_test(disk, detector, digits_options, tmp_path, campaign):
    (disk.before / 'out.pkl').write_bytes(b'earlier')
    outcome = disk.run(
        '16k', 'test', CONFIG, detector, '--work-dir', tmp_path / 'work', '--out',
        disk.place / 'out.pkl', '--cfg-options', *digits_options, *NARROW,
        'model.test_cfg.score_thr=0.0',
    )  # fmt: skip
    check(outcome, disk.place / 'out.pkl')
    assert not outcome.new
    campaign(CAMPAIGN, 'test.py --out')


def test_out_of_test_of_a_segmentor(disk, segmentor, label_map_options, tmp_path, campaign):
    (disk.before / 'maps').mkdir()
    (disk.before / 'maps' / 'earlier.png').write_bytes(b'earlier')
    outcome = disk.run(
        '16k', 'test', SEGMENTOR, segmentor, '--work-dir', tmp_path / 'work', '--out',
        disk.place / 'maps', '--cfg-options', *label_map_options,
    )  # fmt: skip
    file = outcome.error.partition(': No space')[0]
    assert Path(file).name in ('maps', '.part-maps')
    check(outcome, file)
    assert not [name for name in outcome.new if name.startswith('maps/')]
    campaign(CAMPAIGN, 'test.py --out of a segmentor')


def test_train(disk, digits_options, campaign):
    """No checkpoint in part."""
    outcome = disk.run(
        '1m', 'train', CONFIG, '--work-dir', disk.place / 'work', '--cfg-options', *digits_options,
        *NARROW, 'train_cfg.max_epochs=1', 'model.test_cfg.score_thr=0.5',
    )  # fmt: skip
    check(outcome, disk.place / 'work' / 'epoch_1.pth')
    assert not [name for name in outcome.new if name.endswith('.pth')]
    assert 'work/last_checkpoint' not in outcome.new
    campaign(CAMPAIGN, 'train.py, first checkpoint')


def test_train_with_earlier_checkpoint(disk, digits_options, campaign):
    """The one checkpoint that is kept stays where the next does not fit."""
    options = [
        '--cfg-options', *digits_options, *NARROW, 'model.test_cfg.score_thr=0.5',
        'default_hooks.checkpoint.max_keep_ckpts=1', 'train_cfg.val_interval=9',
    ]  # fmt: skip
    work = disk.before / 'work'
    program('train', CONFIG, '--work-dir', str(work), *options, 'train_cfg.max_epochs=1')
    size = (work / 'epoch_1.pth').stat().st_size
    outcome = disk.run(
        f'{size * 3 // 2 // 1024 + 200}k', 'train', CONFIG, '--work-dir', disk.place / 'work',
        '--resume', *options, 'train_cfg.max_epochs=2',
    )  # fmt: skip
    check(outcome, disk.place / 'work' / 'epoch_2.pth')
    assert torch.load(disk.after / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    campaign(CAMPAIGN, 'train.py, second of one kept')


@pytest.mark.parametrize('size', ['64k', '1m'])
def test_deploy(disk, detector, size, campaign):
    """Neither weights nor config."""
    outcome = disk.run(
        size, 'model_converters/switch_to_deploy', CONFIG, detector, disk.place / 'x.pth',
        '--cfg-options', *NARROW,
    )  # fmt: skip
    check(outcome, disk.place / 'x.pth')
    assert not outcome.new
    campaign(CAMPAIGN, f'switch_to_deploy.py, {size}')


def test_deploy_config(disk, detector, campaign):
    outcome = disk.run(
        '4k', 'model_converters/switch_to_deploy', CONFIG, detector, disk.place / 'x.pth',
        '--cfg-options', *NARROW,
    )  # fmt: skip
    check(outcome, disk.place / 'x.py')
    assert not outcome.new
    campaign(CAMPAIGN, 'switch_to_deploy.py, its config')


def test_export(disk, detector, campaign):
    pytest.importorskip('onnxruntime', reason='the extra onnx is not installed')
    outcome = disk.run(
        '64k', 'model_converters/export_onnx', CONFIG, detector, disk.place / 'x.onnx',
        '--size', 70, 90, '--cfg-options', *NARROW,
    )  # fmt: skip
    check(outcome, disk.place / 'x.onnx')
    assert not outcome.new
    campaign(CAMPAIGN, 'export_onnx.py')


def test_publish(disk, detector, campaign):
    outcome = disk.run('1m', 'model_converters/publish_model', detector, disk.place / 'x')
    assert outcome.error.startswith(f'{disk.place}/x-')
    check(outcome, outcome.error.partition(': No space')[0])
    assert not outcome.new
    campaign(CAMPAIGN, 'publish_model.py')


@pytest.mark.parametrize('suffix', ['json', 'png'])
def test_benchmark(disk, suffix, campaign):
    """An earlier measurement stays."""
    file = f'earlier.{suffix}'
    (disk.before / file).write_bytes(b'earlier')
    option = {'json': '--json', 'png': '--plot'}[suffix]
    outcome = disk.run(
        '4k', 'analysis_tools/benchmark', 'operator', '--shapes', '1x8x8x8', '--rounds', 1,
        '--no-memory', '--modes', 'forward', option, disk.place / file,
    )  # fmt: skip
    check(outcome, disk.place / file)
    assert not outcome.new
    campaign(CAMPAIGN, f'benchmark.py {option}')


SCENES = [
    '--train', 20, '--val', 1, '--size', 96, '--single-train', 10, '--single-val', 10,
]  # fmt: skip


def test_scene_digits(disk, campaign):
    """None of its folders."""
    outcome = disk.run('100k', 'dataset_converters/scene_digits', disk.place, *SCENES)
    check(outcome, disk.place)
    assert not outcome.new
    campaign(CAMPAIGN, 'scene_digits.py')


def test_scene_digits_again(disk, campaign):
    """Those that were to be replaced stay."""
    for name in ('coco', 'ade', 'imagenet'):
        (disk.before / name).mkdir()
        (disk.before / name / 'earlier').write_text(name)
    outcome = disk.run('100k', 'dataset_converters/scene_digits', disk.place, *SCENES, '--force')
    check(outcome, disk.place)
    assert not outcome.new
    campaign(CAMPAIGN, 'scene_digits.py --force')
