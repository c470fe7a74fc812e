"""README and docs: links lead somewhere, and commands do what the pages say, on small data.

Every line of every ``bash`` block is either run, after the changes of :data:`CHANGES` that make it
small, or named in :data:`ELSEWHERE` with the test that has it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
SOURCES += sorted((ROOT / 'configs').rglob('README.md'))
PAGES = [str(page.relative_to(ROOT)) for page in SOURCES if '_build' not in page.parts]

# Pages and commands that have tests of their own: a pattern of 'page: command', and the test file.
ELSEWHERE = {
    r'docs/own_data.md: .*': 'tests/test_own_data.py',
    r'docs/install.md: .*': 'tests/test_installed.py',
    r'docs/upstream_tools.md: .*': 'tests/test_upstream.py',
    r'docs/coco.md: (MMDET=|python \$MMDET).*': 'tests/test_upstream.py',
    r'.*: (pip|MMCV_WITH_OPS=1 pip) .*': 'tests/test_constraints.py',
    r'.*: make (demo|test).*': 'tests/tools/test_demo.py',
    r'.*: python tools/demo.py .*': 'tests/tools/test_demo.py',
    r'.*: python -m acmix_mm.check': 'tests/test_check.py',
    r'.*: .*tools/slurm_train.sh.*': 'tests/tools/test_launchers.py',
    r'.*: NNODES=2 .*': 'tests/tools/test_launchers.py',
    r'.*: python tools/analysis_tools/benchmark.py gpu .*': 'tests/tools/test_benchmark.py',
    r'.*: python tools/analysis_tools/benchmark.py scaling .*': 'tests/tools/test_benchmark.py',
    # Weights of torchvision, and what follows from them; the same program runs further down there.
    r'.*resnet2acmix.py resnet50.*': 'tests/tools/test_resnet2acmix.py',
    # Of a training on ImageNet.
    r'configs/imagenet/README.md: (mkdir|cp) .*': 'tests/test_starts.py',
}  # fmt: skip
DEMO = {
    'coco': 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py',
    'ade20k': 'configs/demo/acmix-pvt_fpn_scene-digits.py',
    'in1k': 'configs/demo/acmix-r26_scene-digits.py',
}
BENCHMARK = 'tools/analysis_tools/benchmark.py'
SMALL = {
    'operator': '1x16x8x8', 'attention': '1x4x4x8x8', 'backbone': '1x3x64x64', 'fps': '96x96',
    'shift': '1x4x4x8x8', 'detector': '64x64',
}  # fmt: skip
DATA = '--train 16 --val 8 --single-train 20 --single-val 20'
# What makes commands small, in this order.
CHANGES = [
    (r'\.venv/bin/python', 'python'),
    (r'(scene_digits\.py \S+)', rf'\1 --force {DATA}'),
    # Recipes: the demo's for the same task.
    (r'configs/pvt/retinanet\S*', 'configs/demo/retinanet_r26_fpn_scene-digits.py'),
    *(
        (rf'configs/(?!demo|ablation)[\w/.{{}},*-]*_{kind}(-512x512)?\.py', demo)
        for kind, demo in DEMO.items()
    ),
    (r'(--cfg-options) model\.backbone\.init_cfg\S*.*', r'\1 model.backbone.norm_eval=False'),
    (r'(dist_train\.sh \S+) 8', r'\1 2'),
    (r'\bCHECKPOINT\b', '$TRAINED'),
    (r'\b(IMAGE_OR_FOLDER|IMAGES)\b', 'data/scene_digits/coco/val2017'),
    (r'\bOUT\b', 'pictures_of_classes'),
    (r'SEED', '0'),
    (r'^RUN=.*', 'RUN=$(dirname $TRAINED)'),
    (r'epoch_\d+\.pth', 'epoch_1.pth'),
    (r'000000000\d*\[0-4\]\*', '*'),
    # Trainings of an epoch.
    (r'(train_cfg\.max_epochs|param_scheduler\.1\.\w+)=\d+', ''),
    (r'(dist_train\.sh \S+ \d|tools/train\.py \S+)((?!.*max-).*)', r'\1 --max-epochs 1\2'),
    (r' --auto-scale-lr', ''),  # the demo's configs are for one process
    (r'--seeds( \d)+', '--seeds 0'),
    (r'--rate-factors.*?(?= --)', '--rate-factors 1 3'),
    (r'(--max-epochs|--search-epochs|--jobs) \d+', r'\1 1'),
    (r'(compare\.py (?!.*--max-epochs).*)', r'\1 --max-epochs 1'),
    # Networks that have learned nothing find nothing above the usual threshold.
    (r'(compare\.py .*)', r'\1 --cfg-options model.test_cfg.score_thr=0.0'),
    (r'--num-images \d+', '--num-images 12'),
    # Measurements of small inputs, once.
    *[(rf'({BENCHMARK}.*?) --(shapes|rounds|warmup)( \d[\dx]*)+', r'\1')] * 3,
    (rf'({BENCHMARK}.*) --no-memory', r'\1'),
    *(
        (rf'({BENCHMARK} {suite})(.*)', rf'\1 --shapes {size} --rounds 1 --warmup 1\2')
        for suite, size in SMALL.items()
    ),
    (rf'({BENCHMARK} (?!fps).*)', r'\1 --no-memory'),
]  # fmt: skip
TASKS = {'docs/ade20k.md': 'ade20k', 'configs/imagenet/README.md': 'in1k'}
RUN = ('python tools/', 'tools/dist_', 'CONFIG=', 'RUN=', 'IMAGE=')


def commands(page: str) -> list[str]:
    """Lines of a page's shell blocks, continued ones joined, without comments."""
    blocks = re.findall(r'^```bash\n(.*?)^```', (ROOT / page).read_text(), re.M | re.S)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    lines = (re.sub(r'\s+', ' ', re.sub(r'(^|\s)#.*', '', line)).strip() for line in lines)
    return [line for line in lines if line]


def elsewhere(page: str, command: str) -> str | None:
    """The test that has a command, None if it is run here."""
    command = command.replace('.venv/bin/python', 'python')
    found = (t for pattern, t in ELSEWHERE.items() if re.fullmatch(pattern, f'{page}: {command}'))
    return next(found, None)


def small(command: str) -> str:
    for pattern, replacement in CHANGES:
        command = re.sub(pattern, replacement, command)
    return command


def anchors(text: str) -> set[str]:
    """What headings can be linked by, as GitHub and MyST name them."""
    headings = re.findall(r'^#+ (.*)$', re.sub(r'^```.*?^```', '', text, flags=re.M | re.S), re.M)
    plain = (re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in headings)
    return set(plain)


@pytest.mark.parametrize('page', PAGES)
def test_links(page):
    text = re.sub(r'^```.*?^```', '', (ROOT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r'\]\(([^)\s]*)\)', text):
        if re.match(r'https?:', target):
            continue
        file, _, anchor = target.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), target


@pytest.mark.parametrize('page', PAGES)
def test_every_command_is_known(page):
    for command in commands(page):
        test = elsewhere(page, command)
        if test is not None:
            assert (ROOT / test).is_file(), (command, test)
        else:
            assert small(command).startswith(RUN), command


def test_no_rule_is_left_over():
    known = [f'{page}: {c}' for page in PAGES for c in commands(page)]
    known = [command.replace('.venv/bin/python', 'python') for command in known]
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in known), pattern


@pytest.fixture(scope='session')
def clone(tmp_path_factory) -> Path:
    """The repository's files, without what git ignores, but with the native kernels, and data."""
    folder = tmp_path_factory.mktemp('docs') / 'clone'
    listed = subprocess.check_output(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, text=True
    )
    natives = [str(file.relative_to(ROOT)) for file in (ROOT / 'acmix_mm').rglob('*.so')]
    for name in [*listed.splitlines(), *natives]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    run(folder, [small('python tools/dataset_converters/scene_digits.py data/scene_digits')], {})
    return folder


@cache
def trained(clone: Path, kind: str) -> str:
    """A checkpoint of the demo's model for a task."""
    work_dir = f'work_dirs/for_{kind}'
    run(clone, [f'python tools/train.py {DEMO[kind]} --work-dir {work_dir} --max-epochs 1'], {})
    name = (clone / work_dir / 'last_checkpoint').read_text()
    return str(Path(work_dir, Path(name).name))


def run(folder: Path, lines: list[str], settings: dict[str, str]) -> str:
    """Run a script of lines; the test fails with the first of them that does."""
    python = folder / 'bin' / 'python'
    if not python.exists():
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
    path = f'{python.parent}{os.pathsep}{os.environ["PATH"]}'
    env = {**os.environ, 'PATH': path, 'PYTHONPATH': str(folder), 'PYTHON': 'python', **settings}
    script = '\n'.join(['set -eu', *lines])
    result = subprocess.run(
        ['bash', '-xc', script], cwd=folder, env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, '\n'.join([*lines, result.stdout[-2000:], result.stderr[-4000:]])
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES)
def test_commands(page, clone):
    pytest.importorskip('mmseg')
    lines = [small(c) for c in commands(page) if elsewhere(page, c) is None]
    if not lines:
        pytest.skip('the page has no command that is run here')
    kind = TASKS.get(page, 'coco')
    if page == 'docs/pretraining/README.md':  # what make demo TASK=classification leaves
        lines.insert(0, f'cp {trained(clone, "in1k")} checkpoints/acmix-r26_single-digits.pth')
        lines.insert(0, 'mkdir -p checkpoints')
    run(clone, lines, {'CONFIG': DEMO[kind], 'TRAINED': trained(clone, kind)})


@pytest.mark.slow
def test_site(tmp_path):
    """make docs, whose warnings are errors."""
    pytest.importorskip('myst_nb')
    command = [sys.executable, '-m', 'sphinx', '--fail-on-warning', '--keep-going', '--quiet']
    result = subprocess.run(
        [*command, 'docs', str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / 'how_it_works.html').read_text()
    assert '<math' in page
    assert 'acmix_mm.layers.ACmix' in (tmp_path / 'api.html').read_text()


def test_notebook_shows_what_it_does():
    """It is stored as tools/dev/execute_notebook.py leaves it, without the machine's paths."""
    notebook = json.loads((ROOT / 'docs/scene_digits.ipynb').read_text())
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    assert [cell['execution_count'] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell['outputs']]
    pictures = [o for o in outputs if {'image/jpeg', 'image/png'} & set(o.get('data', {}))]
    assert len(pictures) == 5
    assert not [o for o in outputs if o['output_type'] == 'error']
    texts = json.dumps([{**o, 'data': o.get('data', {}).get('text/markdown')} for o in outputs])
    assert not re.search(r'/(tmp|home|root|work|usr)/', texts)


@pytest.mark.slow
def test_notebook(clone):
    """Every cell runs, on few pictures for an epoch."""
    nbformat, nbclient = (pytest.importorskip(name) for name in ('nbformat', 'nbclient'))
    pytest.importorskip('mmdet')
    notebook = nbformat.read(clone / 'docs' / 'scene_digits.ipynb', as_version=4)
    lines = ['import os', "os.environ.update(TRAIN_IMAGES='24', EPOCHS='1')"]
    notebook.cells.insert(0, nbformat.v4.new_code_cell('\n'.join(lines)))
    resources = {'metadata': {'path': str(clone)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert 'largest relative difference' in notebook.cells[-2].outputs[0].text
