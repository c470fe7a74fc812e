import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its kernels are tested in its interpreter.
    os.environ['TRITON_INTERPRET'] = '1'

# Products in float32 are compared with float64.
torch.backends.cudnn.allow_tf32 = False

if 'PYTEST_XDIST_WORKER' in os.environ:
    # Workers share the cores, and so do the processes that tests start.
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

# Loggers of earlier tests write to what pytest has closed, and would say so with a traceback.
logging.raiseExceptions = False


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_way_of_loading():
    """A program that a test calls has all of its process loaded safely, for good."""
    name = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(name)
    yield
    os.environ.pop(name, None)
    if before is not None:
        os.environ[name] = before


@pytest.fixture
def golden():
    """Reads a golden file: arrays of the published module, as float64 tensors by their names."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(ROOT / 'tests' / 'data' / 'golden' / f'{name}.npz') as file:
            return {k: torch.from_numpy(file[k]).double() for k in file.files if k != 'meta'}

    return load


@pytest.fixture(scope='session')
def scene_digits(tmp_path_factory) -> Path:
    """A very small scene digits data set."""
    from scene_digits import main as make_scene_digits  # scikit-image, which few tests need

    out = tmp_path_factory.mktemp('scene_digits')
    sizes = {'train': 12, 'val': 4, 'size': 96, 'single-train': 20, 'single-val': 10}
    make_scene_digits([str(out), *(f'--{name}={number}' for name, number in sizes.items())])
    return out


def very_small_run(root: Path) -> list[str]:
    """--cfg-options with which a scene-digits config runs on the data under ``root``."""
    options = ['train_dataloader.batch_size=4', 'default_hooks.checkpoint.max_keep_ckpts=-1']
    for split in ('train', 'val', 'test'):
        options += [
            f'{split}_dataloader.dataset.data_root={root}/',
            f'{split}_dataloader.num_workers=0',
            f'{split}_dataloader.persistent_workers=False',
        ]
    return options


@pytest.fixture(scope='session')
def digits_options(scene_digits) -> list[str]:
    """--cfg-options with which a detector's config runs on the very small data set."""
    root = scene_digits / 'coco'
    file = f'{root}/annotations/instances_val2017.json'
    return [
        *very_small_run(root), f'val_evaluator.ann_file={file}', f'test_evaluator.ann_file={file}'
    ]  # fmt: skip


@pytest.fixture(scope='session')
def label_map_options(scene_digits) -> list[str]:
    """--cfg-options with which a segmentor's config runs on the very small data set."""
    return very_small_run(scene_digits / 'ade')


@pytest.fixture(scope='session')
def single_digits_options(scene_digits) -> list[str]:
    """--cfg-options with which a classifier's config runs on the very small data set."""
    return very_small_run(scene_digits / 'imagenet')


COLOURS = {
    'n07': (200, 40, 40), 'n01': (40, 200, 40), 'n12': (40, 40, 200),
    'n03': (200, 200, 40), 'n05': (40, 200, 200), 'n02': (200, 40, 200),
}  # fmt: skip


@pytest.fixture(scope='session')
def image_folders(tmp_path_factory) -> Path:
    """Images in ImageNet's layout: six classes, each of one colour with noise."""
    from PIL import Image  # the operators' tests do without it

    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    for split, count in (('train', 8), ('val', 3)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.normal(0, 30, (40, 50, 3))
                picture = np.clip(noise + colour, 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / f'{name}_{i}.JPEG')
    return root


@pytest.fixture(scope='session')
def image_folders_options(image_folders) -> list[str]:
    """--cfg-options with which a classifier's config runs on the very small data set."""
    classes = ','.join(f"'{name}'" for name in sorted(COLOURS))
    return [
        *very_small_run(image_folders),
        *(f'{s}_dataloader.dataset.metainfo.classes=[{classes}]' for s in ('train', 'val', 'test')),
    ]


@pytest.fixture
def campaign(record_property):
    """Counts a case of a campaign, for the table that closes a run of the tests.

    ``campaign('kills while training', 'seed 3', reason=None)``; with a reason, the case did not end
    as wanted, is listed by name and does not fail the test by itself.
    """

    def count(name: str, case: str, reason: str | None = None) -> None:
        record_property('campaign', (name, case, reason))

    return count


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of campaigns: how many cases were tried, and which did not end as wanted."""
    cases: dict[str, list[tuple[str, str | None]]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, 'user_properties', ()):
                if key == 'campaign' and report.when == 'call':
                    cases.setdefault(value[0], []).append(tuple(value[1:]))
    if not cases:
        return
    terminalreporter.section('campaigns')
    terminalreporter.write_line('| campaign | tried | as wanted | not as wanted |')
    terminalreporter.write_line('|---|---|---|---|')
    for name in sorted(cases):
        others = sorted(f'{case}: {reason}' for case, reason in cases[name] if reason)
        tried = len(cases[name])
        listed = '; '.join(others) or '0'
        terminalreporter.write_line(f'| {name} | {tried} | {tried - len(others)} | {listed} |')
