"""Arguments with a fault end in one line before work starts, and leave nothing."""

import importlib
import os
import subprocess
import sys

import pytest
import train
from refusals import refusal

CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
PREDICT = f'predict {{image}} {CONFIG} {{file}} --out-dir {{new}}'
TRAIN = f'train {CONFIG} --work-dir {{new}}'
TEST = f'test {CONFIG} {{file}} --work-dir {{new}}'
# Command line, in which {new} is not there, {file} is a text and {image} a picture; and what the
# message has to name. Of each program.
CASES = {
    'train': ('the following arguments are required: config', 'train'),
    'train no.py': ('config no.py does not exist', 'train no.py'),
    'train a folder': ('config configs/demo does not exist', 'train configs/demo'),
    'train a picture': ('{image}', 'train {image}'),
    'train --work-dir a file': ('--work-dir {file}: {file} is no folder',
                                f'train {CONFIG} --work-dir {{file}}'),
    'train --work-dir below a file': ('{file} is no folder',
                                      f'train {CONFIG} --work-dir {{file}}/runs'),
    'train --launcher x': ("argument --launcher: invalid choice: 'x'", f'{TRAIN} --launcher x'),
    'train --launcher pytorch': ('--launcher pytorch: the environment variable RANK is not set; '
                                 'torchrun', f'{TRAIN} --launcher pytorch'),
    'train --launcher slurm': ('--launcher slurm: the environment variable SLURM_PROCID is not '
                               'set; srun', f'{TRAIN} --launcher slurm'),
    'train --launcher mpi': ('--launcher mpi: the environment variable OMPI_COMM_WORLD_RANK is '
                             'not set; mpirun', f'{TRAIN} --launcher mpi'),
    'train --local-rank': ("argument --local-rank/--local_rank: invalid int value: 'x'",
                           f'{TRAIN} --local-rank x'),
    'train --epochs': ('unrecognized arguments: --epochs 3', f'{TRAIN} --epochs 3'),
    'train --resume': ('{new}', f'{TRAIN} --resume {{new}}/none.pth'),
    'train option without a value': ("must be KEY=VALUE with pairs of brackets, got 'a'",
                                     f'{TRAIN} --cfg-options a'),
    'train option without a key': ("got '=3'", f'{TRAIN} --cfg-options =3'),
    'train half a list': ("got 'train_cfg=[1'", f'{TRAIN} --cfg-options train_cfg=[1'),
    'train empty name': ('model.backbone..depth: a name between dots is empty',
                         f'{TRAIN} --cfg-options model.backbone..depth=3'),
    'train below a number': ('model.backbone.depth is 26, which has no x',
                             f'{TRAIN} --cfg-options model.backbone.depth.x=3'),
    'train beyond a list': ('train_dataloader.dataset.pipeline is a list of',
                            f'{TRAIN} --cfg-options train_dataloader.dataset.pipeline.99.prob=1'),
    'train no index': ('its elements are named 0 to',
                       f'{TRAIN} --cfg-options train_dataloader.dataset.pipeline.first.prob=1'),
    'train both': ('--cfg-options', f'{TRAIN} --cfg-options work_dir=3 work_dir.x=1'),
    'train unread': ('nothing reads lr of a config; the setting is optim_wrapper.optimizer.lr',
                     f'{TRAIN} --cfg-options lr=0.1'),
    'train load_from': ('{new}.pth', f'{TRAIN} --cfg-options load_from={{new}}.pth'),
    'test': ('the following arguments are required', 'test'),
    'test no checkpoint': ('the following arguments are required: checkpoint', f'test {CONFIG}'),
    'test missing checkpoint': ('no.pth', f'test {CONFIG} no.pth --work-dir {{new}}'),
    'test a text': ('{file}', TEST),
    'test --out': ('--out must end in .pkl or .pickle, got x.txt', f'{TEST} --out x.txt'),
    'test --wait-time': ("argument --wait-time: invalid float value: 'x'",
                         f'{TEST} --wait-time x'),
    'predict missing input': ('{new}', f'predict {{new}} {CONFIG} {{file}} --out-dir {{new}}'),
    'predict --score-thr': ('--score-thr must be between 0 and 1, got 2.0',
                            f'{PREDICT} --score-thr 2'),
    'predict --score-thr nan': ('--score-thr must be between 0 and 1, got nan',
                                f'{PREDICT} --score-thr nan'),
    'predict --batch-size': ('--batch-size must be at least 1, got 0', f'{PREDICT} --batch-size 0'),
    'predict --limit': ('--limit must be at least 1, got -1', f'{PREDICT} --limit -1'),
    'predict --device': ("'cuda:99'", f'{PREDICT} --device cuda:99'),
    'predict --device gpu': ("'gpu' is not cpu, cuda or cuda:N", f'{PREDICT} --device gpu'),
    'predict no --out-dir': ('the following arguments are required: --out-dir',
                             f'predict {{image}} {CONFIG} {{file}}'),
    'predict --out-dir a file': ('{file}',
                                 f'predict {{image}} {CONFIG} {{file}} --out-dir {{file}}'),
    'complexity --shape': ('--shape must be one or two positive integers, got [0]',
                           f'complexity {CONFIG} --shape 0'),
    'complexity three': ('got [1, 2, 3]', f'complexity {CONFIG} --shape 1 2 3'),
    'complexity a text': ("argument --shape: invalid int value: 'x'",
                          f'complexity {CONFIG} --shape x'),
    'complexity no size': ('give one by --shape H W', f'complexity {CONFIG}'),
    'complexity --plot': ("argument --plot: '{new}.txt' must end in .png",
                          f'complexity {CONFIG} --plot {{new}}.txt'),
    'complexity --json': ('folder {new} does not exist',
                          f'complexity {CONFIG} --json {{new}}/out.json'),
    'compare labels': ('labels must be one for each of 1 configs, got 2',
                       f'compare {CONFIG} --labels a b --work-dir {{new}}'),
    'compare twice': ('configs must differ, got',
                      f'compare {CONFIG} {CONFIG} --work-dir {{new}}'),
    'compare --seeds': ("argument --seeds: '-1' is not an integer",
                        f'compare {CONFIG} --work-dir {{new}} --seeds=-1'),
    'compare --max-epochs': ('argument --max-epochs', f'compare {CONFIG} --max-epochs 0'),
    'compare --jobs': ('jobs must be from 1 to the number of threads, 2, got 99',
                       f'compare {CONFIG} --work-dir {{new}} --jobs 99 --threads 2'),
    'benchmark': ('the following arguments are required', 'benchmark'),
    'benchmark suite': ("invalid choice: 'no'", 'benchmark no'),
    'benchmark --rounds': ('argument --rounds', 'benchmark operator --rounds 0'),
    'benchmark --json': ('argument --json', 'benchmark operator --json out.txt'),
    'benchmark --device': ("'cuda:99'", 'benchmark operator --device cuda:99'),
    'benchmark fps --modes': ('unrecognized arguments: --modes', 'benchmark fps --modes train'),
    'benchmark config': ("'no.py': no such config file", 'benchmark detector --configs no.py'),
    'check_dataset --splits': ("invalid choice: 'dev'", f'check_dataset {CONFIG} --splits dev'),
    'check_dataset --out': ('OUT must end in .txt, got {file}',
                            f'check_dataset {CONFIG} --out {{file}}'),
    'scene_digits --train': ('--train must be at least 1, got -1', 'scene_digits {new} --train=-1'),
    'scene_digits --digits': ('--digits must satisfy', 'scene_digits {new} --digits 4 1'),
    'scene_digits a file': ('{file}', 'scene_digits {file}'),
    'acmix2mm missing': ('no.pth', 'acmix2mm no.pth {new}.pth'),
    'acmix2mm suffix': ('OUT must end in .pth, got {new}.txt', 'acmix2mm {file} {new}.txt'),
    'resnet2acmix --size': ('--size must be at least 32, got 3',
                            'resnet2acmix {file} {new}.pth --size 3'),
    'resnet2acmix --num-images': ('--num-images must be at least 2, got 0',
                                  'resnet2acmix {file} {new}.pth --num-images 0'),
    'resnet2acmix folder': ('{new}', 'resnet2acmix {file} {new}/out.pth'),
    'publish_model folder': ('{new}', 'publish_model {file} {new}/out'),
    'publish_model a text': ('{file}', 'publish_model {file} {new}'),
    'switch_to_deploy suffix': ('OUT must end in .pth',
                                f'switch_to_deploy {CONFIG} {{file}} x.bin'),
    'switch_to_deploy exists': ('{old} exists already',
                                f'switch_to_deploy {CONFIG} {{file}} {{old}}'),
    'export_onnx suffix': ('OUT must end in .onnx', f'export_onnx {CONFIG} {{file}} x.pth'),
    'export_onnx --size': ('argument --size: must be 1 or more, got 0 3',
                           f'export_onnx {CONFIG} {{file}} x.onnx --size 0 3'),
    'demo --task': ("argument --task: invalid choice: 'no'", 'demo --task no'),
    'demo --pretrained': ('--pretrained goes with the detection task',
                          'demo --task semantic --pretrained'),
    'demo missing config': ('no.py does not exist', 'demo --config no.py'),
    'demo semantic': ("--task semantic needs default_scope 'mmseg'",
                      f'demo --task semantic --config {CONFIG}'),
    'demo instance': ("--task instance needs test_evaluator.metric ['bbox', 'segm']",
                      f'demo --task instance --config {CONFIG}'),
    'demo other data': ('--task detection needs test_dataloader.dataset.data_root',
                        'demo --config configs/acmix_resnet/'
                        'retinanet_acmix-r50_fpn_8xb2-1x_coco.py'),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_arguments(case, image_folders, tmp_path, campaign, monkeypatch):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    places = {name: tmp_path / name for name in ('new', 'file', 'old')}
    places['old'] = tmp_path / 'old.pth'
    places['file'].write_text('some text')
    places['old'].write_text('old')
    places['image'] = next(image_folders.glob('val/*/*.JPEG'))
    expected, command = (text.format(**places) for text in CASES[case])
    program, *argv = command.split()
    line = refusal(importlib.import_module(program).main, argv)
    assert expected in line
    assert len(line) < 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'old.pth']
    assert (places['file'].read_text(), places['old'].read_text()) == ('some text', 'old')
    campaign('bad arguments', case)


def test_backend_of_the_environment(monkeypatch, tmp_path, campaign):
    monkeypatch.setenv('ACMIX_MM_BACKEND', 'natve')
    line = refusal(train.main, [CONFIG, '--work-dir', str(tmp_path / 'new')])
    assert line == (
        "error: ACMIX_MM_BACKEND must be None or one of ('torch', 'native', 'triton'), got 'natve'"
    )
    campaign('bad arguments', 'ACMIX_MM_BACKEND')


@pytest.mark.parametrize(
    ('arguments', 'code'),
    [
        pytest.param(['--launcher', 'x'], 2, marks=pytest.mark.slow),
        (['--cfg-options', 'model.backbone.depht=3'], 1),
    ],
)
def test_process(arguments, code, tmp_path, campaign):
    """As users see it: one line and no traceback, which --traceback shows."""
    command = [sys.executable, 'tools/train.py', CONFIG, '--work-dir', str(tmp_path / 'new')]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert result.returncode == code
    assert [line[:7] for line in result.stderr.splitlines()] == ['error: ']
    assert not os.listdir(tmp_path)
    campaign('bad arguments', f'process {arguments[0]}')
