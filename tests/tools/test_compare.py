"""Training side by side: what the table says, what is trained again and what is not."""

import csv
import json
import re
from pathlib import Path

import compare
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from acmix_mm.analysis import comparison
from acmix_mm.analysis.costs import count_flops
from acmix_mm.analysis.networks import build_trained, complexity, trained_model
from acmix_mm.analysis.steps import Case
from acmix_mm.config_check import checked_config

CONFIGS = {
    'plain': 'configs/demo/retinanet_r26_fpn_scene-digits.py',
    'mixed': 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py',
}
INSTANCE = 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py'  # trains for five epochs
SEMANTIC = 'configs/demo/acmix-swin_upernet_scene-digits.py'
COCO = 'configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py'
ADE20K = 'configs/acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py'
METRICS = ('coco/bbox_mAP_50', 'coco/bbox_mAP')


@pytest.fixture(scope='module', autouse=True)
def _one_round():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(comparison, 'ROUNDS', 1)
        yield


@pytest.fixture(scope='module')
def options(digits_options):
    return [
        '--threads', '1', '--cfg-options', *digits_options, 'default_hooks.logger.interval=1',
        'model.backbone.base_channels=8', 'model.neck.in_channels=[32,64,128,256]',
        'model.test_cfg.score_thr=0.0',  # hardly trained, it is sure of nothing
    ]  # fmt: skip


@pytest.fixture(scope='module')
def arguments(options, tmp_path_factory):
    """Of two models, two seeds, one epoch of three iterations; the last is the work directory."""
    work_dir = str(tmp_path_factory.mktemp('compare'))
    return [
        *CONFIGS.values(), '--labels', *CONFIGS, '--seeds', '0', '1', '--max-epochs', '1',
        *options, '--work-dir', work_dir,
    ]  # fmt: skip


@pytest.fixture(scope='module')
def work_dir(arguments):
    """The work directory with these runs finished."""
    compare.main(arguments)
    return Path(arguments[-1])


def run_folder(work_dir: Path, label: str, seed: int, epochs: int = 1) -> Path:
    (folder,) = [
        folder
        for folder in work_dir.glob(f'{Path(CONFIGS[label]).stem}-????????')
        if Config.fromfile(folder / 'config.py').train_cfg.max_epochs == epochs
    ]
    return folder / f'seed{seed}'


def logged(run: Path, key: str) -> list[float]:
    """What a run's latest log says, by iteration."""
    file = max(run.glob('*/vis_data/scalars.json'))
    rows = map(json.loads, file.read_text().splitlines())
    return [row[key] for row in rows if key in row]


def table(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


@pytest.mark.slow
class TestRuns:
    def test_metrics_are_those_of_the_logs(self, work_dir):
        rows = table(work_dir / 'comparison.csv')
        runs = [(row['model'], int(row['seed'])) for row in rows]
        assert runs == [(label, seed) for label in CONFIGS for seed in (0, 1)]
        for run, row in zip(runs, rows, strict=True):
            (log,) = run_folder(work_dir, *run).glob('evaluation/*/*.json')
            metrics = json.loads(log.read_text())
            assert [float(row[m]) for m in METRICS] == [metrics[m] for m in METRICS]

    def test_costs(self, work_dir):
        for row in table(work_dir / 'comparison.csv'):
            run = run_folder(work_dir, row['model'], int(row['seed']))
            state = torch.load(run / 'epoch_1.pth', weights_only=False)['state_dict']
            counts = {
                name: value.numel()
                for name, value in state.items()
                if not name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))
            }
            backbone = [n for name, n in counts.items() if name.startswith('backbone.')]
            assert int(row['parameters']) == sum(counts.values())
            assert int(row['backbone_parameters']) == sum(backbone)
            assert row['config'] == CONFIGS[row['model']]
            assert row['image'] == '96x96'
            assert all(float(row[k]) > 0 for k in ('gflops', 'forward_ms', 'train_ms'))

    def test_schedule_is_scaled(self, work_dir):
        """A third and two thirds through the cosine, times the warm-up of 50 iterations."""
        rates = logged(run_folder(work_dir, 'plain', 0), 'lr')
        cosine = [1, 0.75, 0.25]
        expected = [3e-3 * (0.01 + 0.99 * i / 49) * cosine[i] for i in range(3)]
        assert rates == pytest.approx(expected, rel=0.05)  # the least rate counts for little

    def test_finished_runs_are_not_repeated(self, work_dir, arguments, capsys):
        files = sorted(work_dir.glob('*/seed*/*'))
        times = [file.stat().st_mtime_ns for file in files]
        before = table(work_dir / 'comparison.csv')
        compare.main([*arguments, '--jobs', '1'])
        said = capsys.readouterr().out
        assert '4 runs, 4 of them finished before' in said
        assert said.splitlines()[-4:] == [
            f'runs:      {work_dir}/comparison.csv',
            f'all:       {work_dir}/comparison.json',
            f'plot:      {work_dir}/comparison.png',
            f'logs:      {work_dir}',
        ]
        assert sorted(work_dir.glob('*/seed*/*')) == files
        assert [file.stat().st_mtime_ns for file in files] == times
        for row, earlier in zip(table(work_dir / 'comparison.csv'), before, strict=True):
            for key in ('model', 'seed', *METRICS, 'gflops', 'parameters'):
                assert row[key] == earlier[key]

    def test_other_budget_failure_and_resumption(
        self, work_dir, options, scene_digits, tmp_path, capsys, monkeypatch
    ):
        """Two epochs are a new run, which fails in the end; called again, it goes on."""
        monkeypatch.setattr(comparison, 'check_beginnings', list)  # as if it were lost later
        labels = tmp_path / 'labels.json'
        arguments = [
            CONFIGS['plain'], '--seeds', '0', '--max-epochs', '2', *options,
            f'val_evaluator.ann_file={labels}', '--work-dir', str(work_dir),
            '--out', str(tmp_path / 'out'),
        ]  # fmt: skip
        with pytest.raises(SystemExit) as error:
            compare.main(arguments)
        run = run_folder(work_dir, 'plain', 0, epochs=2)
        expected = rf'failed:\n  .*, seed 0: exit code 1: .*{labels} is no file.* \(log: '
        assert re.fullmatch(rf'{expected}{run}/.*', error.value.code)
        assert (
            '[1/1] retinanet_r26_fpn_scene-digits, seed 0: exit code 1' in capsys.readouterr().out
        )
        assert not (tmp_path / 'out.md').exists()
        losses = logged(run, 'loss')
        assert len(losses) == 6
        # The same seed has the same weights and data at first, another seed has others.
        assert losses[0] == logged(run_folder(work_dir, 'plain', 0), 'loss')[0]
        assert losses[0] != logged(run_folder(work_dir, 'plain', 1), 'loss')[0]

        labels.write_bytes((scene_digits / 'coco/annotations/instances_val2017.json').read_bytes())
        (run / 'epoch_2.pth').unlink()  # as if interrupted in the second epoch, and moved
        (run / 'last_checkpoint').write_text('elsewhere/epoch_1.pth')
        compare.main(arguments)
        assert logged(run, 'loss') == losses[3:]
        (row,) = table(tmp_path / 'out.csv')
        assert json.loads((run / 'metrics.json').read_text())[METRICS[0]] == float(row[METRICS[0]])


@pytest.mark.parametrize(('file', 'data'), [(INSTANCE, 'digits'), (SEMANTIC, 'label_map')])
def test_costs_of_other_tasks(file, data, request, tmp_path):
    config, checkpoint = str(tmp_path / 'config.py'), str(tmp_path / 'x.pth')
    options = request.getfixturevalue(f'{data}_options')
    args = compare.parse_args([file, '--cfg-options', *options, 'train_dataloader.batch_size=2'])
    cfg = comparison.prepare(checked_config(file, args.cfg_options), file)
    cfg.dump(config)
    init_default_scope(cfg.default_scope)
    torch.save(MODELS.build(cfg.model).state_dict(), checkpoint)
    cost = complexity(config, checkpoint, 'cpu')
    _, model = trained_model(config, checkpoint)
    assert cost['parameters'] == sum(p.numel() for p in model.parameters())
    assert cost['image'] == (96, 96)
    image = torch.zeros(1, 3, 96, 96)
    with torch.no_grad():
        assert cost['flops'] > count_flops(lambda: model.eval().backbone(image)) > 0
    for train in (False, True):
        step = build_trained(config, checkpoint, Case(cost['image'], train))
        step()
        assert (step.leaves[0].grad is not None) == train


@pytest.mark.slow
def test_search(work_dir, options, tmp_path, capsys):
    """At 1e12 times the rate training diverges, which stops nothing and is not repeated."""
    arguments = [
        CONFIGS['plain'], '--labels', 'plain', '--seeds', '0', '1', '--max-epochs', '1',
        '--rate-factors', '1', '1e12', *options, '--work-dir', str(work_dir),
        '--out', str(tmp_path / 'out'), '--cost', 'train',
    ]  # fmt: skip
    compare.main(arguments)
    said = capsys.readouterr().out
    assert 'search of learning rates: 2 runs, 0 of them finished before' in said
    assert 'at 1e+12x the rate, seed 1000: diverged: training stopped at iteration' in said
    assert '2 runs, 2 of them finished before' in said  # of the comparison without a search
    rows = table(tmp_path / 'out.csv')
    assert [(row['purpose'], row['seed'], row['outcome']) for row in rows] == [
        ('search', '1000', 'finished'), ('search', '1000', 'diverged'),
        ('comparison', '0', 'finished'), ('comparison', '1', 'finished'),
    ]  # fmt: skip
    assert [float(row['learning_rate']) for row in rows] == [3e-3, 3e9, 3e-3, 3e-3]
    assert '(edge)' in (tmp_path / 'out.md').read_text()
    compare.main(arguments)
    assert '2 runs, 2 of them finished before' in capsys.readouterr().out.splitlines()[0]


PAIR = ' '.join(CONFIGS.values())


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (f'{PAIR} --labels a', 'labels must be one for each of 2 configs, got 1'),
        (f'{PAIR} --labels a a', 'labels must differ, got a twice'),
        (f'{PAIR} --seeds 0 1 0', 'seeds must differ, got 0 twice'),
        (f'{PAIR} --rate-factors 3', 'rate_factors must be at least two that differ, got 3'),
        (f'{PAIR} --rate-factors 0', "--rate-factors: '0' is not a number above 0"),
        (f'{PAIR} --cost power', "--cost: invalid choice: 'power'"),
        (f'{PAIR} --out README.md/x', 'README.md is no folder|folder .*README.md is none'),
        (f'{PAIR} --seeds -1', "--seeds: '-1' is not an integer from 0"),
        (f'{PAIR} --max-epochs 0', "--max-epochs: '0' is not an integer above 0"),
        (f'{PAIR} --threads 2 --jobs 3', 'jobs must be from 1 to the number of threads, 2, got 3'),
        (f'{PAIR} {CONFIGS["plain"]}', 'configs must differ, got .*r26.* twice'),
        (f'{PAIR} --metric mIoU mIoU', 'metrics must differ, got mIoU twice'),
        ('nowhere.py', 'config nowhere.py does not exist'),
        ('configs/_base_/default_runtime.py', 'default_runtime.py has no model'),
        (
            f'{PAIR} --metric mIoU',
            'metrics: .* produces coco/bbox_mAP, coco/bbox_mAP_50, .* got mIoU',
        ),
        (SEMANTIC, 'metrics: .* produces aAcc, mAcc, mIoU, got coco/bbox_mAP_50'),
        (f'{PAIR} {INSTANCE}', 'max_epochs is 4 in .*r26.* and 5 in .*mask-rcnn.*max_epochs or'),
        (f'{ADE20K} --max-epochs 1', r'max_epochs: .* counts iterations \(train_cfg'),
        (
            f'{PAIR} --cfg-options val_dataloader.dataset.data_root=nowhere/',
            r'nowhere/.* does not exist .* is given by val_dataloader\.dataset\.data_root',
        ),
    ],
)
def test_wrong_arguments(capsys, tmp_path, scene_digits, arguments, message):
    """Refused before anything is written."""
    data = f'train_dataloader.dataset.data_root={scene_digits}/coco'
    if '--cfg-options' not in arguments:
        data = f'--cfg-options {data} val_dataloader.dataset.data_root={scene_digits}/coco'
    work_dir = tmp_path / 'work_dir'
    with pytest.raises(SystemExit) as error:
        compare.main([*arguments.split(), *data.split(), '--work-dir', str(work_dir)])
    said = capsys.readouterr().err if error.value.code == 2 else error.value.code
    assert re.search(message, said)
    assert not work_dir.exists()
