import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from processes import free_port, run_two_processes

from acmix_mm.command_line import LENGTH, in_one_line, join_processes, load_config

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')

PROGRAM = """
import re, sys
from pathlib import Path
import torch
from acmix_mm.command_line import keep_freed_memory
def resident():
    status = Path('/proc/self/status').read_text()
    return int(re.search(r'VmRSS:\\s+(\\d+) kB', status)[1]) >> 10
if sys.argv[1] == 'keep':
    keep_freed_memory()
before = resident()
maps = torch.ones(2**25)  # 128 MiB
del maps
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@without_gpu
def test_keep_freed_memory():
    grown = {}
    for policy in ('keep', 'default'):
        result = subprocess.run(
            [sys.executable, '-c', PROGRAM, policy], capture_output=True, text=True, check=True
        )
        grown[policy] = int(result.stdout)
    assert grown['default'] < 20
    assert grown['keep'] > 100


@pytest.mark.slow
@without_gpu
def test_once(tmp_path):
    """One process acts; both have what it did to the config."""
    log, file = tmp_path / 'log', tmp_path / 'results'
    run_two_processes(Path(__file__).with_name('act_once.py'), log, file)
    assert log.read_text() == '0 acted\n'
    first, second = torch.load(file)
    assert first == second == {'weights': 'found by 0', 'backend': 'gloo'}


@without_gpu
def test_once_ends_all_processes(tmp_path):
    """By a message, and by exit codes of both; a process that went on would write."""
    log, file = tmp_path / 'log', tmp_path / 'results'
    with pytest.raises(AssertionError) as failure:
        run_two_processes(Path(__file__).with_name('act_once.py'), log, file, 'error: no weights')
    assert str(failure.value).count('error: no weights') == 1
    assert log.read_text() == '0 acted\n0 exits with error: no weights\n1 exits with 1\n'
    assert not file.exists()


@without_gpu
@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_other_launchers(launcher, monkeypatch):
    """A job of one process, which mmengine starts where it finds a GPU alone."""
    variables = {
        'SLURM_PROCID': 0, 'SLURM_LOCALID': 0, 'SLURM_NTASKS': 1, 'SLURM_NODELIST': 'here',
        'OMPI_COMM_WORLD_LOCAL_RANK': 0, 'OMPI_COMM_WORLD_SIZE': 1, 'OMPI_COMM_WORLD_RANK': 0,
        'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': free_port(),
        # Which mmengine sets:
        'RANK': None, 'WORLD_SIZE': None, 'LOCAL_RANK': None,
        'OMP_NUM_THREADS': 1, 'MKL_NUM_THREADS': 1,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    join_processes(Config({'launcher': launcher}))
    try:
        assert torch.distributed.get_backend() == 'gloo'
        assert torch.distributed.get_world_size() == 1
    finally:
        torch.distributed.destroy_process_group()


CONFIGS = Path(__file__).parents[1] / 'configs'
COCO = CONFIGS / 'acmix_swin/mask-rcnn_acmix-swin-t_fpn_8xb2-1x_coco.py'
ADE20K = CONFIGS / 'acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py'
LOADERS = [f'{split}_dataloader' for split in ('train', 'val', 'test')]


@pytest.mark.parametrize(
    ('config', 'option', 'places'),
    [
        (COCO, 'backbone.drop_path_rate', ['model.backbone']),
        (COCO, 'data_root', [f'{loader}.dataset.data_root' for loader in LOADERS]),
        (COCO, 'dataset_type', [f'{loader}.dataset.type' for loader in LOADERS]),
        (COCO, 'train_pipeline.0.type', ['train_dataloader.dataset.pipeline']),
        (ADE20K, 'test_pipeline', ['test_dataloader.dataset.pipeline']),
        (COCO, 'mask_head.num_convs', ['model.roi_head.mask_head']),
        (ADE20K, 'lr', ['optim_wrapper.optimizer.lr']),
        (ADE20K, 'vis_backends', ['visualizer.vis_backends']),
    ],
)
def test_options_that_nothing_reads(config, option, places):
    with pytest.raises(SystemExit) as refusal:
        load_config(str(config), {option: 1})
    key = option.partition('.')[0]
    expected = f'error: --cfg-options {option}: nothing reads {key} of a config; the setting is '
    assert str(refusal.value) == expected + ', '.join(places)


def test_an_option_without_a_place():
    with pytest.raises(SystemExit, match='nothing reads epochs of a config; no setting has this'):
        load_config(str(COCO), {'epochs': 1})


def test_options_that_are_read():
    """Also such as the file does not have, and new ones below those that it has."""
    options = {
        'model.backbone.patch_norm': False, 'auto_scale_lr.enable': True, 'compile': True,
        'find_unused_parameters': True, 'tta_model.type': 'DetTTAModel', 'randomness.seed': 3,
        'custom_imports.allow_failed_imports': True, 'default_scope': 'mmdet',
        'model_wrapper_cfg.broadcast_buffers': True,
    }  # fmt: skip
    cfg = load_config(str(COCO), options)
    for option, value in options.items():
        assert functools.reduce(lambda setting, key: setting[key], option.split('.'), cfg) == value


class Faulty(torch.utils.data.Dataset):
    """Raises what loading raises."""

    def __init__(self, error: Exception):
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise self.error


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (KeyError('boxes'), "KeyError: 'boxes'"),
        (ValueError('two\n  lines\nof text'), 'ValueError: two lines of text'),
        (FileNotFoundError(2, 'No such file', 'a.jpg'), 'a.jpg'),
    ],
)
def test_errors_of_workers(error, expected):
    """What a worker raised, without its traceback."""
    loader = torch.utils.data.DataLoader(Faulty(error), num_workers=1)
    with pytest.raises(type(error)) as raised:
        list(loader)
    line = in_one_line(raised.value)
    assert expected in line
    assert 'Traceback' not in line
    assert 'File "' not in line
    assert '\n' not in line


@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.'),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
    ],
)
def test_out_of_memory(error):
    assert in_one_line(error).startswith('out of memory; smaller batches')


def test_long_errors():
    assert len(in_one_line(RuntimeError('word ' * 1000))) == LENGTH


def test_bare_assertions(tmp_path):
    """Of code that pytest has not rewritten."""
    file = tmp_path / 'asserts.py'
    file.write_text('size = 3\nassert size == 4\n')
    with pytest.raises(AssertionError) as raised:
        runpy.run_path(str(file))
    assert in_one_line(raised.value) == 'AssertionError: assert size == 4'


PIPE = """
import sys
from acmix_mm.command_line import program
@program
def main(argv=None):
    for _ in range(100000):
        print('a line of output')
main()
"""


def test_output_that_nobody_reads(tmp_path):
    """As behind ``| head``: no message, and not success."""
    with subprocess.Popen(
        [sys.executable, '-c', PIPE], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b''
        assert process.wait() == 141
