"""Every program that reads a checkpoint, given one that must not be used: one line, nothing done.

Files that run code (tests/hostile.py), files that are damaged, and files that are no checkpoints.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import acmix2mm
import compare
import export_onnx
import hostile
import numpy as np
import predict
import publish_model
import pytest
import resnet2acmix
import switch_to_deploy
import test as evaluate  # tools/test.py
import torch
import train
from mmengine.config import Config
from PIL import Image
from programs import program, scalars

from acmix_mm import deploy
from acmix_mm.weights import build

CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
SEGMENTOR = 'configs/demo/acmix-swin_upernet_scene-digits.py'
INIT_CFG = "model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint={file!r})))"


def not_finite(file: Path) -> None:
    torch.save({'state_dict': {'backbone.a': torch.tensor([0, float('nan')])}}, file)


def flipped(file: Path) -> None:
    torch.save({'state_dict': {'backbone.a': torch.ones(64)}}, file)
    content = bytearray(file.read_bytes())
    content[content.index(torch.ones(64).numpy().tobytes()) + 70] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    torch.save({'state_dict': {'backbone.a': torch.ones(999)}}, file)
    file.write_bytes(file.read_bytes()[:-900])


BAD_FILES: dict[str, Callable[[Path], object]] = {
    'not finite': not_finite,
    'a flipped bit': flipped,
    'cut off': cut,
    'empty': Path.touch,
    'text': lambda file: file.write_text('# a model\n'),
    'a folder': Path.mkdir,
    'a pipe': os.mkfifo,
    'no weights': lambda file: torch.save({'meta': {}, 'state_dict': {}}, file),
}
KINDS = [*hostile.FILES, *BAD_FILES]


def write(kind: str, file: Path, marker: Path) -> None:
    if kind in hostile.FILES:
        hostile.FILES[kind](file, marker)
    else:
        BAD_FILES[kind](file)


def recipe(base: str, text: str, folder: Path) -> str:
    """A config that names the checkpoint."""
    file = folder / 'recipe.py'
    file.write_text(f"_base_ = '{Path(base).resolve()}'\n{text}\n")
    return str(file)


def last_checkpoint(file: Path, work: Path) -> list[str]:
    """A work directory with the checkpoint as its latest."""
    work.mkdir()
    file.rename(work / 'epoch_1.pth')
    (work / 'last_checkpoint').write_text(str(work / 'epoch_1.pth'))
    return [CONFIG, '--resume', '--work-dir', str(work)]


def picture(folder: Path) -> str:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / 'x.png')
    return str(folder / 'x.png')


# By name, the program and its arguments for a checkpoint, what it writes being below `out`.
TOOLS: dict[str, tuple[object, Callable[[Path, Path], list[str]]]] = {
    'train load_from': (
        train,
        lambda file, out: [
            CONFIG, '--work-dir', str(out), '--cfg-options', f'load_from={file}',
        ],
    ),
    'train init_cfg': (
        train,
        lambda file, out: [
            recipe(CONFIG, INIT_CFG.format(file=str(file)), out.parent), '--work-dir', str(out),
        ],
    ),
    'train pretrained': (
        train,
        lambda file, out: [
            recipe(SEGMENTOR, f"model = dict(pretrained='{file}')", out.parent),
            '--work-dir', str(out),
        ],
    ),
    'train --resume FILE': (
        train, lambda file, out: [CONFIG, '--resume', str(file), '--work-dir', str(out)]
    ),
    'train --resume': (train, last_checkpoint),
    'compare': (
        compare,
        lambda file, out: [
            recipe(CONFIG, INIT_CFG.format(file=str(file)), out.parent), '--work-dir', str(out),
        ],
    ),
    'test': (evaluate, lambda file, out: [CONFIG, str(file), '--work-dir', str(out)]),
    'test --tta': (
        evaluate, lambda file, out: [CONFIG, str(file), '--work-dir', str(out), '--tta']
    ),
    'test of a segmentor': (
        evaluate, lambda file, out: [SEGMENTOR, str(file), '--work-dir', str(out)]
    ),
    'predict': (
        predict,
        lambda file, out: [
            picture(out.parent), CONFIG, str(file), '--out-dir', str(out), '--device', 'cpu',
        ],
    ),
    'predict of a segmentor': (
        predict,
        lambda file, out: [
            picture(out.parent), SEGMENTOR, str(file), '--out-dir', str(out), '--device', 'cpu',
        ],
    ),
    'switch_to_deploy': (
        switch_to_deploy, lambda file, out: [CONFIG, str(file), str(out.with_suffix('.pth'))]
    ),
    'export_onnx': (
        export_onnx, lambda file, out: [CONFIG, str(file), str(out.with_suffix('.onnx'))]
    ),
    'publish_model': (publish_model, lambda file, out: [str(file), str(out)]),
    'acmix2mm': (acmix2mm, lambda file, out: [str(file), str(out.with_suffix('.pth'))]),
    'acmix2mm --reverse': (
        acmix2mm, lambda file, out: [str(file), str(out.with_suffix('.pth')), '--reverse']
    ),
    'resnet2acmix': (resnet2acmix, lambda file, out: [str(file), str(out.with_suffix('.pth'))]),
}  # fmt: skip


def refuse(tool: str, kind: str, folder: Path) -> None:
    """Run a program on a file; it has to refuse it in one line, and to do nothing else."""
    program, arguments = TOOLS[tool]
    file, marker = folder / 'bad.pth', folder / 'it-ran'
    write(kind, file, marker)
    arguments = arguments(file, folder / 'out')
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        program.main(arguments)
    assert isinstance(text := caught.value.code, str)
    assert '\n' not in text
    assert text.startswith('error: ')
    assert file.stem in text or tool == 'train --resume'
    assert not marker.exists()
    # The work directory of --resume was there before, and may hold a log now.
    after = {path: path.lstat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    assert tool == 'train --resume' or after == before


@pytest.mark.parametrize(
    ('tool', 'kind'),
    [(tool, KINDS[3 * number % len(KINDS)]) for number, tool in enumerate(TOOLS)],
)
def test_every_tool_refuses_a_file(tool, kind, tmp_path, campaign):
    refuse(tool, kind, tmp_path)
    campaign('hostile checkpoints', f'{tool}: {kind}')


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('tool', TOOLS)
def test_every_tool_refuses_every_file(tool, kind, tmp_path, campaign):
    refuse(tool, kind, tmp_path)
    campaign('hostile checkpoints', f'{tool}: {kind}')


@pytest.fixture(scope='module')
def trained(digits_options, tmp_path_factory):
    """A checkpoint of an epoch, with text in it that makes a file where it is executed."""
    folder = tmp_path_factory.mktemp('trained')
    options = [*digits_options, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=9']
    program('train', CONFIG, '--work-dir', str(folder), '--cfg-options', *options)
    checkpoint = torch.load(folder / 'epoch_1.pth', weights_only=False)
    code = f'open({str(folder / "it-ran")!r}, "w")'
    checkpoint['meta'].update(config=code, cfg=code)
    checkpoint['message_hub']['runtime_info'].update(cfg=code)
    torch.save(checkpoint, folder / 'texts.pth')
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('tool', ['train --resume', 'train load_from', 'test', 'predict'])
def test_texts_are_not_executed(tool, trained, digits_options, tmp_path, campaign):
    """Where all else is in order, so that the program does its work."""
    file, options = str(trained / 'texts.pth'), ['--cfg-options', *digits_options]
    work = ['--work-dir', str(tmp_path)]
    if tool == 'train --resume':
        options += ['train_cfg.max_epochs=2', 'train_cfg.val_interval=9']
        program('train', CONFIG, '--resume', file, *work, *options)
        assert (tmp_path / 'epoch_2.pth').exists()
        assert not (tmp_path / 'epoch_1.pth').exists()
    elif tool == 'train load_from':
        options += ['train_cfg.max_epochs=1', 'train_cfg.val_interval=9', f'load_from={file}']
        program('train', CONFIG, *work, *options)
        assert scalars(tmp_path)
    elif tool == 'test':
        assert 'log: ' in program('test', CONFIG, file, *work, *options)
    else:
        source = picture(tmp_path)
        program('predict', source, CONFIG, file, '--out-dir', str(tmp_path), *options)
        assert (tmp_path / 'predictions.json').exists()
    assert not (trained / 'it-ran').exists()
    campaign('hostile checkpoints', f'{tool}: text that is a program')


def state_dict(key: str = 'work_dir', value: object = None) -> dict:
    """Weights of the config's model with another setting."""
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict({key: value})
    return build(cfg).state_dict()


def without(weights: dict, part: str) -> dict:
    return {name: value for name, value in weights.items() if part not in name}


def deployed() -> dict:
    return deploy(build(Config.fromfile(CONFIG)).eval()).state_dict()


# By kind, weights that do not fit the config, and what the message says.
OTHERS: dict[str, tuple[Callable[[], dict], str]] = {
    'of a deeper model': (
        lambda: state_dict('model.backbone.depth', 38), 'of its 4.. weights are not in the model'
    ),
    'half of the weights': (
        lambda: without(state_dict(), 'layer3'), r'weights are missing, such as backbone\.layer3'
    ),
    'without the head': (
        lambda: without(state_dict(), 'bbox_head'), r'weights are missing, such as bbox_head'
    ),
    'of other classes': (
        lambda: state_dict('model.bbox_head.num_classes', 7),
        r'retina_cls.weight: \(63, 64, 3, 3\) instead of \(90, 64, 3, 3\)',
    ),
    'with weights besides': (
        lambda: {**state_dict(), 'mask_head.weight': torch.ones(1)}, 'such as mask_head.weight'
    ),
    'deployed': (deployed, 'it is of the form for inference; its config is the file beside it'),
}  # fmt: skip
EVALUATING = ['train --resume FILE', 'test', 'predict', 'switch_to_deploy', 'export_onnx']


@pytest.mark.parametrize(
    ('tool', 'kind'),
    [
        pytest.param(tool, kind, marks=[] if i == j else pytest.mark.slow)
        for i, tool in enumerate(EVALUATING)
        for j, kind in enumerate(OTHERS)
    ],
)
def test_weights_of_another_model(tool, kind, tmp_path, campaign):
    weights, message = OTHERS[kind]
    file = tmp_path / 'bad.pth'
    meta = {'epoch': 1, 'iter': 1, 'dataset_meta': {'classes': list('0123456789')}}
    torch.save({'state_dict': weights(), 'meta': meta, 'message_hub': {}, 'optimizer': {}}, file)
    program, arguments = TOOLS[tool]
    with pytest.raises(SystemExit, match=message) as caught:
        program.main(arguments(file, tmp_path / 'out'))
    assert re.match(r'error: checkpoint \S+ (does not fit config|is not for resuming)',
                    caught.value.code)  # fmt: skip
    assert '\n' not in caught.value.code
    assert not list(tmp_path.glob('out*'))
    campaign('hostile checkpoints', f'{tool}: {kind}')


@pytest.mark.slow
@pytest.mark.parametrize('tool', EVALUATING)
def test_a_training_for_a_deployed_config(tool, tmp_path, campaign):
    file = tmp_path / 'bad.pth'
    config = recipe(CONFIG, 'model = dict(backbone=dict(deploy=True))', tmp_path)
    torch.save(
        {
            'state_dict': state_dict(),
            'meta': {'epoch': 1, 'iter': 1},
            'message_hub': {},
            'optimizer': {},
        },
        file,
    )
    program, arguments = TOOLS[tool]
    arguments = [config if a == CONFIG else a for a in arguments(file, tmp_path / 'out')]
    with pytest.raises(SystemExit, match=r'it is of the model as it is trained|deployed already'):
        program.main(arguments)
    assert not list(tmp_path.glob('out*'))
    campaign('hostile checkpoints', f'{tool}: a training for a deployed config')
