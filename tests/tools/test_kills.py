"""Trainings that are killed, at random moments and while a checkpoint is written, lose nothing.

Each is a process of its own, with two workers that load data, forked from this one, so that it
starts at once. It ends by SIGKILL, goes on with --resume, and has to end with the weights of a run
that nothing has disturbed, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import train
from mmengine.fileio import LocalBackend

from acmix_mm.checkpoints import read_checkpoint
from acmix_mm.engine import newest_checkpoint
from acmix_mm.files import claim

CONFIG = """
_base_ = '{root}/configs/demo/{base}'
default_hooks = dict(logger=dict(interval=1))
train_dataloader = dict(dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]))
"""
OPTIONS = (
    'train_cfg.max_epochs=4', 'train_cfg.val_interval=100', 'val_evaluator=None',
    'val_dataloader=None', 'val_cfg=None', 'train_dataloader.num_workers=2',
    'train_dataloader.persistent_workers=True', 'train_dataloader.batch_size=3',
    'default_hooks.checkpoint.max_keep_ckpts=1',
)  # fmt: skip
NARROW = (
    'model.backbone.base_channels=8', 'model.neck.in_channels=[32,64,128,256]',
    'model.neck.out_channels=16', 'model.bbox_head.in_channels=16',
    'model.bbox_head.feat_channels=16', 'model.bbox_head.stacked_convs=1',
)  # fmt: skip
PATIENCE = 600  # seconds, for a machine that is busy


def write_config(file: Path, root: Path, base: str) -> str:
    file.write_text(CONFIG.format(root=root, base=base, masks='mask-rcnn' in base))
    return str(file)


class Training:
    """A training in a process of its own."""

    def __init__(self, arguments: list[str], prepare: Callable[[], None] = lambda: None):
        folder = Path(arguments[arguments.index('--work-dir') + 1])
        self.log = folder.with_suffix('.log')
        self.pid = os.fork()
        if self.pid == 0:
            self._train(arguments, prepare)

    def _train(self, arguments: list[str], prepare: Callable[[], None]) -> None:
        os.setsid()
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(log, 'w', buffering=1)  # not pytest's
        code = 1
        try:
            torch.set_num_threads(1)
            prepare()
            train.main(arguments)
            code = 0
        except SystemExit as end:
            print(end.code, flush=True)
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def is_running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """The exit code, negative for a signal; None if it has not ended by then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL


@pytest.fixture(scope='module')
def arguments(digits_options, pytestconfig, tmp_path_factory):
    """Of a training, but for its work directory."""
    file = tmp_path_factory.mktemp('config') / 'retinanet.py'
    base = 'retinanet_acmix-r26_fpn_scene-digits.py'
    config = write_config(file, pytestconfig.rootpath, base)
    return [config, '--resume', '--cfg-options', *digits_options, *OPTIONS, *NARROW, '--work-dir']


def finish(arguments: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end of a training, which has to end well."""
    training = Training([*arguments, str(folder)])
    assert training.wait() == 0, training.log.read_text()
    return read_checkpoint(str(folder / 'epoch_4.pth'))['state_dict']


def assert_same(weights, others) -> None:
    torch.testing.assert_close(weights, others, rtol=0, atol=0)


def assert_clean(folder: Path) -> None:
    """One checkpoint is there, whole, and nothing half-written."""
    assert [path.name for path in folder.glob('*.pth')] == ['epoch_4.pth']
    assert newest_checkpoint(folder) == str(folder / 'epoch_4.pth')
    assert not list(folder.glob('.part-*'))


@pytest.fixture(scope='module')
def undisturbed(arguments, tmp_path_factory):
    """Weights at the end, and how many seconds it took."""
    begin = time.monotonic()
    weights = finish(arguments, tmp_path_factory.mktemp('undisturbed') / 'run')
    return weights, time.monotonic() - begin


@pytest.mark.slow
def test_kills_while_training(arguments, undisturbed, campaign, tmp_path):
    """At least 20, at random moments, several in each training."""
    weights, seconds = undisturbed
    moments = random.Random(0)
    kills = 0
    trainings = 0
    while kills < 20:
        folder = tmp_path / str(trainings)
        trainings += 1
        for part in range(4):
            begin = time.monotonic()
            training = Training([*arguments, str(folder)])
            moment = moments.uniform(0.1, 0.9) * seconds
            code = training.wait(moment)
            if code is None:
                os.kill(training.pid, signal.SIGKILL)
                code = training.wait()
            if code != -signal.SIGKILL:  # it has come to its end before
                assert code == 0, training.log.read_text()
                if part == 0:  # the machine had more to do when seconds were taken
                    seconds = min(seconds, time.monotonic() - begin)
                break
            kills += 1
            campaign('kills while training', f'training {trainings}, after {moment:.1f} s')
        assert_same(finish(arguments, folder), weights)
        assert_clean(folder)
    assert trainings <= 12


def pause(reached: int) -> None:
    os.write(reached, b'.')
    time.sleep(PATIENCE)


def pausing(moment: str, checkpoint: str, reached: int) -> Callable[[], None]:
    """What makes a training stop for ever at a moment of writing a checkpoint, having said so."""
    put, remove, replace = LocalBackend.put, LocalBackend.remove, os.replace

    def put_half(backend, content, file):
        of_this = (Path(file).name == f'.part-{checkpoint}') or (
            Path(file).name == '.part-last_checkpoint' and checkpoint.encode() in content
        )
        names = {'half': f'.part-{checkpoint}', 'half of last_checkpoint': '.part-last_checkpoint'}
        if of_this and Path(file).name == names.get(moment):
            put(backend, content[: len(content) // 2], file)
            pause(reached)
        put(backend, content, file)

    def replace_or_pause(source, target):
        if moment == 'whole' and Path(target).name == checkpoint:
            pause(reached)
        replace(source, target)
        if moment == 'in its place' and Path(target).name == checkpoint:
            pause(reached)

    def remove_or_pause(backend, file):
        if moment == 'before the old one goes' and (Path(file).parent / checkpoint).exists():
            pause(reached)
        remove(backend, file)

    def prepare() -> None:
        LocalBackend.put, LocalBackend.remove = put_half, remove_or_pause
        os.replace = replace_or_pause

    return prepare


MOMENTS = ['half', 'whole', 'in its place', 'half of last_checkpoint', 'before the old one goes']


@pytest.mark.slow
@pytest.mark.parametrize('moment', MOMENTS)
def test_kills_while_a_checkpoint_is_written(moment, arguments, undisturbed, campaign, tmp_path):
    """Of which one is kept: the second and the third, so 10 kills."""
    folder = tmp_path / 'run'
    for epoch in (2, 3):
        reached, reach = os.pipe()
        training = Training([*arguments, str(folder)], pausing(moment, f'epoch_{epoch}.pth', reach))
        os.close(reach)
        said = os.read(reached, 1)  # empty if it has ended
        os.close(reached)
        assert said == b'.', training.log.read_text()
        training.kill()
        before = newest_checkpoint(folder)
        assert before in {str(folder / f'epoch_{i}.pth') for i in (epoch - 1, epoch)}
        campaign('kills while a checkpoint is written', f'checkpoint {epoch}, {moment}')
    assert_same(finish(arguments, folder), undisturbed[0])
    assert_clean(folder)


@pytest.mark.slow
def test_scheduler(arguments, undisturbed, tmp_path):
    """SIGTERM to all processes of a training, as Slurm sends it: exit code 75, and it goes on."""
    folder = tmp_path / 'run'
    codes = []
    for _ in range(3):
        training = Training([*arguments, str(folder)])
        end = time.monotonic() + PATIENCE
        while not saves(training, len(codes) + 1):
            assert time.monotonic() < end, training.log.read_text()
            assert training.is_running(), training.log.read_text()
            time.sleep(0.05)
        os.killpg(training.pid, signal.SIGTERM)
        codes.append(training.wait())
    assert codes == [75, 75, 75], training.log.read_text()
    assert_same(finish(arguments, folder), undisturbed[0])
    assert_clean(folder)


def saves(training: Training, epoch: int) -> bool:
    """Whether it has said that it saves the checkpoint of an epoch."""
    with contextlib.suppress(FileNotFoundError):
        return f'Saving checkpoint at {epoch} epochs' in training.log.read_text()
    return False


def test_folder_in_use(arguments, campaign, tmp_path):
    """The second of two trainings is refused, and writes nothing."""
    with claim(tmp_path), pytest.raises(SystemExit) as end:
        train.main([*arguments, str(tmp_path)])
    assert end.value.code == f'error: folder {tmp_path} is in use by process {os.getpid()}'
    assert [path.name for path in tmp_path.iterdir()] == ['.lock']
    campaign('two processes', 'train.py in a folder in which another one trains')


@pytest.mark.slow
def test_damaged_checkpoint(arguments, undisturbed, tmp_path):
    """Training goes on from the one before, and says so; nothing is lost."""
    folder = tmp_path / 'run'
    finish([*arguments[:-1], 'default_hooks.checkpoint.max_keep_ckpts=2', arguments[-1]], folder)
    file = folder / 'epoch_4.pth'
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert_same(finish(arguments, folder), undisturbed[0])
    said = (tmp_path / 'run.log').read_text()
    assert f'passed over: checkpoint {file} cannot be read' in said
    assert f'training goes on from {folder}/epoch_3.pth' in said
    (moved,) = folder.glob('before_*/epoch_4.pth')
    assert moved.read_bytes() == content


@pytest.mark.slow
def test_another_training_in_the_same_folder(arguments, undisturbed, tmp_path):
    """Without --resume, it begins anew, and nothing of the first is written over."""
    folder = tmp_path / 'run'
    finish(arguments, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    again = [argument for argument in arguments if argument != '--resume']
    assert_same(finish(again, folder), undisturbed[0])
    (target,) = folder.glob('before_*')
    assert {'summary.md', 'summary.png'} <= {*before}
    summary = {'summary.md', 'summary.png', 'metrics.json'} & {*before}
    moved = {path.name for path in target.iterdir()}
    assert moved == {'epoch_4.pth', 'last_checkpoint'} | summary
    for name, content in before.items():
        file = folder / name
        kept = target / name if (target / name).exists() else file
        assert kept.read_bytes() == content or name == '.lock'
    assert f'{folder}/epoch_4.pth is {target}/epoch_4.pth now' in (tmp_path / 'run.log').read_text()


@pytest.mark.slow
def test_diverging_training(arguments, tmp_path):
    """It ends with one line, exit code 1, and a checkpoint whose weights are finite."""
    folder = tmp_path / 'run'
    more = ['optim_wrapper.optimizer.lr=1e30', 'default_hooks.checkpoint.interval=1']
    training = Training([*arguments[:-1], *more, arguments[-1], str(folder)])
    assert training.wait() == 1
    line = training.log.read_text().splitlines()[-1]
    assert line.startswith('error: training stopped at iteration ')
    assert 'learning rate: ' in line
    newest_checkpoint(folder)  # reads what there is, and weights that are not finite are refused


@pytest.mark.slow
def test_drop_path_and_sampled_regions(digits_options, pytestconfig, tmp_path):
    """Mask R-CNN on ACmix-Swin, killed once: nothing random in it differs."""
    base = 'mask-rcnn_acmix-swin_fpn_scene-digits.py'
    config = write_config(tmp_path / 'config.py', pytestconfig.rootpath, base)
    options = [*digits_options, *OPTIONS, 'train_cfg.max_epochs=2']
    arguments = [config, '--resume', '--cfg-options', *options, '--work-dir']
    folders = [tmp_path / 'whole', tmp_path / 'killed']
    reached, reach = os.pipe()
    training = Training(
        [*arguments, str(folders[1])], pausing('in its place', 'epoch_1.pth', reach)
    )
    os.close(reach)
    assert os.read(reached, 1) == b'.', training.log.read_text()
    training.kill()
    weights = []
    for folder in folders:
        training = Training([*arguments, str(folder)])
        assert training.wait() == 0, training.log.read_text()
        weights.append(read_checkpoint(str(folder / 'epoch_2.pth'))['state_dict'])
    assert_same(*weights)
    shutil.rmtree(folders[0])
