"""tools/dist_train.sh and dist_test.sh with two processes on a CPU, and what befalls them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import free_port
from programs import program, scalars

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason='two processes without a GPU'),
]
NARROW = [
    'model.backbone.base_channels=8', 'model.neck.in_channels=[32,64,128,256]',
    'model.test_cfg.score_thr=0.0',  # hardly trained, it is sure of nothing
]  # fmt: skip
RUN = [
    'train_dataloader.batch_size=2', 'default_hooks.logger.interval=1', 'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
]  # fmt: skip
RESNET = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
SAN = 'configs/demo/retinanet_acmix-san10_fpn_scene-digits.py'
PVT = 'configs/demo/acmix-pvt_fpn_scene-digits.py'
LIMIT = 500  # seconds, on a machine that has other work


@pytest.fixture(scope='module')
def start():
    """Start a script, as one of its machines; what is left of it in the end is killed."""
    started = []

    def launch(script: str, *arguments, **variables: str) -> subprocess.Popen:
        started.append(
            subprocess.Popen(
                list(map(str, [f'tools/{script}.sh', *arguments])),
                env={**os.environ, 'PYTHON': sys.executable, **variables},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield launch
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def end(process: subprocess.Popen, code: int = 0) -> str:
    """What a script said, which has to end with this code."""
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == code, said
    return said


def workers(launcher: subprocess.Popen) -> dict[int, int]:
    """The launched processes' ids by their ranks."""
    children = Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children').read_text().split()
    ranks = {}
    for child in children:
        variables = Path(f'/proc/{child}/environ').read_text().split('\0')
        ranks |= {int(v.removeprefix('RANK=')): int(child) for v in variables if v[:5] == 'RANK='}
    return ranks


def wait_for_iteration(launcher: subprocess.Popen, work_dir: Path, iteration: int) -> None:
    """Until a run has logged it."""
    end = time.monotonic() + LIMIT
    logged = []
    while not any(row.get('step') == iteration and 'loss' in row for row in logged):
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
        for file in work_dir.glob('*/vis_data/scalars.json'):
            lines = file.read_text().splitlines()
            logged = [json.loads(line) for line in lines if line.endswith('}')]


@pytest.mark.parametrize(
    ('name', 'config', 'changes'),
    [
        ('RetinaNet, ResNet-ACmix', RESNET, NARROW),
        (
            'RetinaNet, SAN-ACmix, synchronised norms', SAN,
            ['sync_bn=torch', 'model.backbone.base_channels=32', 'model.test_cfg.score_thr=0.0',
             'model.neck.in_channels=[128,256,512,1024]'],
        ),
        ('Semantic FPN, PVT-ACmix', PVT, []),
    ],
)  # fmt: skip
def test_trains_and_evaluates(
    start, name, config, changes, digits_options, label_map_options, tmp_path, campaign
):
    """The metrics of both processes are those of one."""
    data = label_map_options if config == PVT else digits_options
    common = ['--work-dir', tmp_path / 'work', '--cfg-options', *data, *RUN, *changes]
    end(start('dist_train', config, 2, *common))
    rows = scalars(tmp_path / 'work')
    assert len([row for row in rows if 'loss' in row]) == 3  # 12 pictures, 4 a step
    (trained,) = [row for row in rows if 'coco/bbox_mAP' in row or 'mIoU' in row]
    checkpoint = tmp_path / 'work' / 'epoch_1.pth'
    common[1] = tmp_path / 'two'
    end(start('dist_test', config, checkpoint, 2, *common))
    common[1] = tmp_path / 'one'
    program('test', config, str(checkpoint), *map(str, common))
    for folder in ('one', 'two'):
        (file,) = (tmp_path / folder).glob('*/*.json')
        metrics = json.loads(file.read_text())
        for key in metrics.keys() - {'time', 'data_time'}:
            assert metrics[key] == pytest.approx(trained[key]), f'{key} of {folder}'
    campaign('two processes', name)


def retinanet(work_dir: Path, data: list[str], *changes: str, processes: int = 2) -> list:
    """Arguments of a small detector's training for two epochs of three iterations."""
    options = [*data, *RUN, *NARROW, 'train_cfg.max_epochs=2', *changes]
    return [RESNET, processes, '--work-dir', work_dir, '--cfg-options', *options]


@pytest.fixture(scope='module')
def undisturbed(start, digits_options, tmp_path_factory):
    """Work directory of a training by two processes of one machine."""
    work_dir = tmp_path_factory.mktemp('undisturbed')
    end(start('dist_train', *retinanet(work_dir, digits_options)))
    return work_dir


def losses(work_dir: Path) -> list[float]:
    return [row['loss'] for row in scalars(work_dir) if 'loss' in row]


def test_two_machines(start, undisturbed, digits_options, tmp_path, campaign):
    """One process each, which train as two of one machine."""
    arguments = retinanet(tmp_path, digits_options, processes=1)
    place = {'NNODES': '2', 'MASTER_ADDR': '127.0.0.1', 'PORT': str(free_port())}
    for machine in [start('dist_train', *arguments, NODE_RANK=rank, **place) for rank in '01']:
        end(machine)
    assert len(losses(tmp_path)) == 6
    assert losses(tmp_path) == losses(undisturbed)
    campaign('two processes', 'two machines of one process')


@pytest.mark.parametrize('rank', [0, 1])
def test_killed_process(start, digits_options, tmp_path, rank, campaign):
    """The other ends within a minute; the message says which was killed."""
    arguments = retinanet(tmp_path, digits_options, 'train_cfg.max_epochs=100')
    launcher = start('dist_train', *arguments)
    wait_for_iteration(launcher, tmp_path, 2)
    ranks = workers(launcher)
    killed = time.monotonic()
    os.kill(ranks[rank], signal.SIGKILL)
    said = end(launcher, 128 + signal.SIGKILL)
    assert time.monotonic() - killed < 60
    assert said.splitlines()[-1] == f'error: process {rank} was killed by SIGKILL; so all are ended'
    assert 'Traceback' not in said
    assert not any(Path(f'/proc/{pid}').exists() for pid in ranks.values())
    campaign('two processes', f'process {rank} killed')


def equal_weights(folder: Path, other: Path) -> bool:
    """Bit for bit, of the last epoch."""
    ours, theirs = (
        torch.load(f / 'epoch_2.pth', weights_only=False)['state_dict'] for f in (folder, other)
    )
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_restarts_after_a_kill(start, undisturbed, digits_options, tmp_path, campaign):
    """From the last checkpoint, to the weights of an undisturbed run.

    The killed process has workers, which outlive it for a while.
    """
    arguments = retinanet(tmp_path, digits_options, 'train_dataloader.num_workers=2')
    launcher = start('dist_train', *arguments, MAX_RESTARTS='1')
    wait_for_iteration(launcher, tmp_path, 5)
    os.kill(workers(launcher)[0], signal.SIGKILL)
    said = end(launcher)
    assert f'goes on from {tmp_path / "epoch_1.pth"}' in said
    assert equal_weights(tmp_path, undisturbed)
    campaign('two processes', 'restart after a kill')


def test_preemption(start, undisturbed, digits_options, tmp_path, campaign):
    """SIGTERM to the script; the same command with --resume ends as an undisturbed run."""
    arguments = retinanet(tmp_path, digits_options)
    launcher = start('dist_train', *arguments, TORCH_ELASTIC_SHUTDOWN_TIMEOUT='300')
    wait_for_iteration(launcher, tmp_path, 4)
    launcher.terminate()
    said = end(launcher, os.EX_TEMPFAIL)
    assert said.splitlines()[-1] == 'all processes are ended by SIGTERM'
    (checkpoint,) = tmp_path.glob('interrupted_*.pth')
    said = end(start('dist_train', *arguments[:4], '--resume', *arguments[4:]))
    assert f'goes on from {checkpoint}' in said
    assert equal_weights(tmp_path, undisturbed)
    campaign('two processes', 'SIGTERM and resumption')


def test_mistake(start, digits_options, tmp_path, campaign):
    """Its message appears once."""
    change = f'load_from={tmp_path}/none.pth'
    said = end(start('dist_train', *retinanet(tmp_path / 'work', digits_options, change)), 1)
    lines = [line for line in said.splitlines() if line.startswith('error: ')]
    assert len(lines) == 2
    assert 'none.pth does not exist' in lines[0]
    assert re.fullmatch(r'error: process [01] ended with exit code 1; so all are ended', lines[1])
    assert 'Traceback' not in said
    campaign('two processes', 'checkpoint missing')


SRUN = """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do shift; done
export SLURM_NTASKS=2 SLURM_NODELIST=here
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
wait $!
"""


def test_slurm(start, undisturbed, digits_options, tmp_path, campaign):
    """Two tasks of a stand-in for srun train as two processes of torchrun."""
    (tmp_path / 'srun').write_text(SRUN)
    (tmp_path / 'srun').chmod(0o755)
    work_dir = tmp_path / 'work'
    config, _, _, _, *options = retinanet(work_dir, digits_options)
    place = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port()), 'GPUS': '2'}
    path = f'{tmp_path}{os.pathsep}{os.environ["PATH"]}'
    end(start('slurm_train', 'partition', 'job', config, work_dir, *options, PATH=path, **place))
    assert losses(work_dir) == losses(undisturbed)
    campaign('two processes', 'two tasks of Slurm')
