"""Comparison runs without training: what is run, what is chosen, what is told of known results."""

import argparse
import csv
import json
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from acmix_mm.analysis import comparison
from acmix_mm.analysis.comparison import Comparison, Recipe, Run, System, best_factor, compare
from acmix_mm.analysis.comparison_report import (
    csv_text,
    differences,
    estimate,
    json_text,
    markdown,
    plot,
    report,
    write_report,
)
from acmix_mm.command_line import add_cfg_options

DEMO = 'configs/demo/retinanet_{}_fpn_scene-digits.py'
CONFIGS = [DEMO.format(name) for name in ('r26', 'acmix-r26')]
INSTANCE = 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py'  # trains for five epochs
COCO = 'configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py'
RATE = 3e-3  # of the demo's configs


@pytest.fixture(autouse=True)
def _from_the_root(pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)


class TestEstimates:
    # The quantiles t(0.975) of Student's distribution, as tables print them.
    TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042}  # noqa: RUF012

    @pytest.mark.parametrize('freedom', TABLE)
    def test_margin_is_that_of_the_table(self, freedom):
        """Values 0 and 1 in turns: their mean and sample variance are closed forms."""
        count = freedom + 1
        values = [i % 2 for i in range(count)]
        ones = count // 2
        mean = ones / count
        deviation = math.sqrt(ones * (count - ones) / count / freedom)
        found = estimate(values)
        assert found.mean == pytest.approx(mean, abs=1e-12)
        expected = self.TABLE[freedom] * deviation / math.sqrt(count)
        assert found.margin == pytest.approx(expected, rel=3e-4)
        assert (found.low, found.high) == (mean - found.margin, mean + found.margin)

    def test_closed_forms_of_the_quantile(self):
        """tan(pi (p - 1/2)) for one degree of freedom, (2p - 1) sqrt(1 / 2p(1 - p)) for two."""
        two, three = [-1.0, 1.0], [-1.0, 0.0, 1.0]  # deviations sqrt(2) and 1
        assert estimate(two).margin == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
        quantile = 0.95 * math.sqrt(1 / (2 * 0.975 * 0.025))
        assert estimate(three).margin == pytest.approx(quantile / math.sqrt(3), rel=1e-9)

    def test_coverage(self):
        """19 of 20 intervals have the mean of the distribution within them."""
        samples = np.random.default_rng(0).normal(0.3, 0.1, (4000, 3))
        found = [estimate(sample.tolist()) for sample in samples]
        covered = np.mean([e.low <= 0.3 <= e.high for e in found])
        assert covered == pytest.approx(0.95, abs=0.012)  # 3.5 standard errors

    def test_one_value_has_no_interval(self):
        found = estimate([0.25])
        assert (found.mean, found.margin, found.low, found.high) == (0.25, None, None, None)
        assert found.text() == '0.250'
        assert estimate([0.5, 0.7]).text('+') == '+0.600 ± 1.271'


def known(
    folder: Path, values: dict[str, dict[int, float | str]], costs: dict | None = None
) -> Comparison:
    """A comparison of results by system and seed, of which texts are of training that diverged."""
    cfg = Config({
        'train_cfg': {'max_epochs': 2}, 'train_dataloader': {'batch_size': 8},
        'optim_wrapper': {'optimizer': {'lr': 0.01}},
    })  # fmt: skip
    systems = []
    for label, results in values.items():
        recipe = Recipe(label, f'configs/{label}.py', cfg, folder)
        systems.append(
            System(label, recipe.file, {1.0: recipe}, [], recipe, (costs or {}).get(label, {}))
        )
        for seed, value in results.items():
            record(Run(recipe, seed), value)
    return Comparison(systems, (0, 3, 1), ('m',), 'cpu', 2)


def record(run: Run, value: float | str) -> None:
    """Leave what a run leaves, with one metric, or of training that diverged."""
    run.folder.mkdir(parents=True)
    if isinstance(value, str):
        (run.folder / 'diverged.txt').write_text(value)
    else:
        (run.folder / 'metrics.json').write_text(json.dumps({'m': value}))


COST = {
    'backbone_parameters': 1200, 'parameters': 34567, 'image': (40, 60), 'flops': 2.5e9,
    'forward': 0.0123, 'train': 0.05,
}  # fmt: skip


class TestReports:
    def test_differences_are_those_of_the_same_seed(self, tmp_path):
        """Though means over all seeds differ by less, as the seed that fails is a good one."""
        results = known(tmp_path, {'a': {0: 0.5, 1: 0.6, 3: 0.9}, 'b': {0: 0.6, 1: 0.8, 3: 'nan'}})
        assert differences(results, results.systems[1], 'm') == pytest.approx([0.1, 0.2])
        table = report(results)
        assert table[1].split()[-3:] == ['train,', 'ms', 'm', 'difference'][-3:]
        # Mean 0.15, deviation 0.1 / sqrt(2), t 12.706.
        assert table[3].endswith('0.700 ± 1.271 (0.600, diverged, 0.800)  +0.150 ± 0.635')

    def test_tables_of_known_runs(self, tmp_path):
        """Intervals, a seed that failed, costs that could not be measured."""
        values = {'a': {0: 0.5, 3: 0.6, 1: 0.7}, 'b': {3: 0.25}}
        results = known(tmp_path, values, costs={'a': COST})
        command = [
            'configs/a.py', '--out', str(Path('docs/x').resolve()), '--cfg-options', 'k="[1, 2]"',
        ]  # fmt: skip
        text = markdown(results, Path('docs/x'), command=command)
        assert [line for line in text.splitlines() if line.startswith('| [')] == [
            '| [a](../configs/a.py) | 1,200 | 34,567 | 2.5 | 12.3 | 50.0 '
            '| 0.600 ± 0.248 (0.500, 0.600, 0.700) |  |',
            '| [b](../configs/b.py) |  |  |  |  |  | 0.250 (failed, 0.250, failed) | -0.350 |',
        ]
        assert 'Search' not in text
        assert f'torch {torch.__version__}' in text
        assert 'max_epochs 2, batch_size 8' in text
        assert 'compare.py configs/a.py --out docs/x --cfg-options \'k="[1, 2]"\'' in text
        assert '](x.png)' in text
        first, *_, last = csv.DictReader(csv_text(results).splitlines())
        assert {key: value for key, value in first.items() if not key.startswith('m mean ')} == {
            'model': 'a', 'config': 'configs/a.py', 'purpose': 'comparison', 'epochs': '2',
            'learning_rate': '0.01', 'rate_factor': '1.0', 'seed': '0', 'outcome': 'finished',
            'm': '0.5', 'backbone_parameters': '1200', 'parameters': '34567', 'image': '40x60',
            'gflops': '2.5', 'forward_ms': '12.3', 'train_ms': '50.0', 'm mean': '0.6',
            'm difference': '', 'm difference low': '', 'm difference high': '',
        }  # fmt: skip
        assert float(first['m mean low']) == pytest.approx(0.6 - 0.2484, abs=1e-4)
        assert float(first['m mean high']) == pytest.approx(0.6 + 0.2484, abs=1e-4)
        assert (last['m'], last['m mean low'], last['gflops']) == ('0.25', '', '')
        assert float(last['m difference']) == pytest.approx(-0.35)
        content = json.loads(json_text(results, command))
        assert [len(system['runs']) for system in content['systems']] == [3, 1]
        assert content['systems'][0]['m mean low'] == pytest.approx(float(first['m mean low']))

    def test_search_is_told(self, tmp_path):
        results = known(tmp_path, {'a': {0: 0.5, 1: 0.6, 3: 0.7}, 'b': {}})
        for system, values in zip(results.systems, [(0.4, 0.3), ('infinite', 'nan')], strict=True):
            for factor, value in zip((0.5, 2.0), values, strict=True):
                cfg = Config({
                    'train_cfg': {'max_epochs': 1}, 'train_dataloader': {'batch_size': 8},
                    'optim_wrapper': {'optimizer': {'lr': 0.01 * factor}},
                })  # fmt: skip
                recipe = Recipe(system.label, system.file, cfg, tmp_path, factor)
                system.search.append(Run(recipe, 1000))
                record(system.search[-1], value)
            system.candidates = {r.recipe.factor: system.recipe for r in system.search}
        cfg = results.systems[0].recipe.cfg
        results.systems[0].recipe = Recipe('a', 'configs/a.py', cfg, tmp_path, 0.5)
        results.systems[1].recipe = None
        lines = [' '.join(line.split()) for line in report(results)]
        assert lines[1:4] == [
            'model 0.5x 2x chosen',
            'a 0.005: 0.400 0.02: 0.300 0.01, at the edge',
            'b 0.005: diverged 0.02: diverged none',
        ]
        assert '0.01 (edge)' in lines[-1]
        text = markdown(results, tmp_path / 'x')
        assert 'm with seed 1000, after training with max_epochs 1, batch_size 8, at' in text
        assert '| 0.005: diverged | 0.02: diverged | none |' in text
        rows = list(csv.DictReader(csv_text(results).splitlines()))
        assert [(r['model'], r['purpose'], r['learning_rate'], r['seed'], r['outcome'], r['m'])
                for r in rows] == [
            ('a', 'search', '0.005', '1000', 'finished', '0.4'),
            ('a', 'search', '0.02', '1000', 'finished', '0.3'),
            ('a', 'comparison', '0.01', '0', 'finished', '0.5'),
            ('a', 'comparison', '0.01', '3', 'finished', '0.7'),
            ('a', 'comparison', '0.01', '1', 'finished', '0.6'),
            ('b', 'search', '0.005', '1000', 'diverged', ''),
            ('b', 'search', '0.02', '1000', 'diverged', ''),
        ]  # fmt: skip

    def test_plot(self, tmp_path, monkeypatch):
        """A panel for each cost, with intervals around means."""
        results = known(tmp_path, {'a': {0: 0.5, 3: 0.6, 1: 0.7}, 'b': {3: 0.25}},
                        costs={'a': COST, 'b': COST})  # fmt: skip
        figures = []
        module = 'acmix_mm.analysis.comparison_report.write_figure'
        monkeypatch.setattr(module, lambda file, figure, dpi: figures.append(figure))
        plot(results, tmp_path / 'x.png', ['train', 'flops'])
        (figure,) = figures
        assert [axis.get_xlabel() for axis in figure.axes] == [
            'time of training, ms an image', 'GFLOPs of a prediction',
        ]  # fmt: skip
        for axis, place in zip(figure.axes, (50, 2.5), strict=True):
            (bar,) = axis.containers[0][2]
            (segment,) = bar.get_segments()
            assert segment[:, 0] == pytest.approx([place, place])
            assert segment[:, 1] == pytest.approx([0.6 - 0.2484, 0.6 + 0.2484], abs=1e-4)

    def test_files(self, tmp_path):
        results = known(tmp_path, {'a': {0: 0.5}}, costs={'a': COST})
        write_report(results, tmp_path / 'out' / 'x')
        names = sorted(file.name for file in (tmp_path / 'out').iterdir())
        assert names == ['x.csv', 'x.json', 'x.md', 'x.png']
        assert (tmp_path / 'out' / 'x.png').stat().st_size > 5000
        with pytest.raises(ValueError, match=r'costs must be of flops, .*, got power'):
            write_report(results, tmp_path / 'y', ['flops', 'power'])
        with pytest.raises(ValueError, match='must have a finished run'):
            write_report(known(tmp_path / 'none', {'a': {}}), tmp_path / 'y')
        assert not list(tmp_path.glob('y*'))


@pytest.mark.parametrize(
    ('results', 'best'),
    [
        ({0.3: 0.2, 1: 0.4, 3: 0.3}, 1),
        ({0.3: 0.5, 1: 0.4, 3: 0.3}, 0.3),
        ({0.3: 0.5, 1: 0.5, 3: 0.5}, 1),  # the config's own
        ({0.1: 0.5, 0.5: 0.5, 3: 0.2}, 0.5),  # next to it
        ({0.5: 0.5, 2: 0.5}, 0.5),  # as near, the smaller one
        ({0.3: 0.0, 1: None, 3: None}, 0.3),
        ({0.3: None, 1: None}, None),
    ],
)
def test_choice_of_a_rate(results, best):
    assert best_factor(results) == best
    assert best_factor(dict(reversed(results.items()))) == best


class Training:
    """In the place of processes that train: leaves results by learning rate and seed.

    Args:
        result (Callable): Of learning rate and seed; a text for training that diverged, None for a
            process that fails.
    """

    def __init__(self, result):
        self.result = result
        self.trained: list[tuple[str, float, int, int]] = []

    def Process(self, target, args):  # as of multiprocessing's contexts
        config, seed, folder, _ = args
        cfg = Config.fromfile(config)
        rate = cfg.optim_wrapper.optimizer.lr
        process = type('Process', (), {'sentinel': None, 'is_alive': lambda self: False})()

        def start() -> None:
            name = Path(cfg.filename).parent.name.partition('_fpn')[0]
            self.trained.append((name, round(rate / RATE, 3), seed, cfg.train_cfg.max_epochs))
            result = self.result(name, rate / RATE, seed)
            process.exitcode = int(result is None)
            folder.mkdir(parents=True, exist_ok=True)
            if isinstance(result, str):
                (folder / 'diverged.txt').write_text(result)
            elif result is not None:
                (folder / 'metrics.json').write_text(json.dumps(result))

        process.start = start
        return process


@pytest.fixture
def run(digits_options, monkeypatch, tmp_path):
    """Calls compare with a :class:`Training` instead of processes, and without costs."""
    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    options = parser.parse_args(['--cfg-options', *digits_options]).cfg_options

    def call(result, **arguments) -> tuple[Comparison, list]:
        training = Training(result)
        monkeypatch.setattr(multiprocessing, 'get_context', lambda method: training)
        monkeypatch.setattr(multiprocessing.connection, 'wait', lambda sentinels: None)
        monkeypatch.setattr(comparison, 'measure_costs', lambda comparison: [])
        arguments = {'seeds': (0, 1), 'metrics': ['coco/bbox_mAP'], 'threads': 1} | arguments
        found = compare(CONFIGS, options=options, work_dir=tmp_path / 'runs', **arguments)
        return found, training.trained

    return call


def scores(value: float) -> dict[str, float]:
    return {'coco/bbox_mAP': value}


class TestSearch:
    def test_every_system_gets_its_own_rate(self, run, capsys):
        """One prefers a third of its rate, the other the largest that does not diverge."""

        def result(name: str, factor: float, seed: int):
            if factor > 2:
                return 'training stopped at iteration 7: a loss is not finite'
            better = factor if 'acmix' in name else 1 - factor
            return scores(0.1 * better + 0.001 * seed)

        arguments = {'rate_factors': [1, 3, 0.3], 'search_epochs': 2}
        found, trained = run(result, **arguments)
        plain, mixed = 'retinanet_r26', 'retinanet_acmix-r26'
        assert trained == [
            *((name, factor, 1000, 2) for factor in (0.3, 1, 3) for name in (plain, mixed)),
            (plain, 0.3, 0, 4), (mixed, 1, 0, 4), (plain, 0.3, 1, 4), (mixed, 1, 1, 4),
        ]  # fmt: skip
        assert found.failures == []
        assert [system.recipe.factor for system in found.systems] == [0.3, 1]
        assert [system.at_edge for system in found.systems] == [True, False]
        assert [system.recipe.rate for system in found.systems] == pytest.approx([9e-4, 3e-3])
        said = capsys.readouterr().out
        assert 'search of learning rates: 6 runs, 0 of them finished before' in said
        assert 'diverged: training stopped at iteration 7: a loss is not finite' in said
        assert (
            'retinanet_r26_fpn_scene-digits: learning rate 0.0009 at the edge of the search '
            '(0.0009 1.070, 0.003 1.000, 0.009 diverged)' in said
        )

        again, trained = run(None, **arguments)  # nothing to train
        assert trained == []
        assert [system.recipe.factor for system in again.systems] == [0.3, 1]
        more, trained = run(result, **{**arguments, 'seeds': (0, 1, 2)})
        assert [entry[2] for entry in trained] == [2, 2]
        assert len(more.finished(more.systems[0])) == 3

    def test_without_a_search_the_same_runs_serve(self, run):
        """The config's own rate has one folder, however it was chosen."""
        _, trained = run(lambda *run: scores(0.5), rate_factors=[0.5, 1, 2])
        assert len(trained) == 6 + 4
        _, trained = run(None)
        assert trained == []

    def test_a_search_that_is_not_finished(self, run):
        """A process that failed decides nothing; the next call goes on from there."""

        def result(name: str, factor: float, seed: int):
            return None if 'acmix' in name and factor == 2 else scores(0.5)

        found, trained = run(result, rate_factors=[1, 2])
        assert [entry[0] for entry in trained[4:]] == ['retinanet_r26'] * 2
        (line,) = found.failures
        assert line.startswith(
            'retinanet_acmix-r26_fpn_scene-digits at 2x the rate, seed 1000: exit code 1: '
        )
        assert found.systems[1].recipe is None
        found, trained = run(lambda *run: scores(0.5), rate_factors=[1, 2])
        assert [entry[1:3] for entry in trained] == [(2, 1000), (1, 0), (1, 1)]
        assert found.failures == []

    def test_no_rate_at_all(self, run):
        """All diverge, or nothing is predicted."""

        def result(name: str, factor: float, seed: int):
            return {} if factor == 1 else 'a loss is not finite'

        found, trained = run(result, rate_factors=[1, 2])
        assert len(trained) == 4
        assert found.failures == [
            f'{system.label}: none of the learning rates gave coco/bbox_mAP'
            for system in found.systems
        ]

    def test_divergence_with_a_seed_is_a_failure(self, run):
        """It is told, and not trained again."""

        def result(name: str, factor: float, seed: int):
            return 'training stopped: a loss is not finite' if seed else scores(0.5)

        for trains in (result, None):
            found, trained = run(trains)
            assert len(trained) == (4 if trains else 0)
            assert len(found.failures) == 2
            assert 'seed 1: diverged: training stopped: a loss is not finite' in found.failures[0]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'rate_factors': [3]}, 'rate_factors must be at least two that differ, got 3$'),
        ({'rate_factors': [1, 3, 1.0]}, 'rate_factors must be at least two that differ, got 1, 1'),
        ({'rate_factors': [0, 1]}, 'rate_factors must be above 0, got 0, 1'),
        (
            {'rate_factors': [1, 2], 'search_seed': 1},
            'search_seed must be none of the seeds, got 1',
        ),
        ({'search_epochs': 2}, 'search_epochs goes with rate_factors, got 2 without them'),
        ({'seeds': []}, 'seeds must be at least one, got none'),
        ({'seeds': [2**32]}, 'seeds must be from 0 to 2'),
        ({'threads': 2, 'jobs': 3}, 'jobs must be from 1 to the number of threads, 2, got 3'),
        ({'max_epochs': 0}, 'max_epochs must be at least 1, got 0'),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        compare(CONFIGS[:1], work_dir=tmp_path / 'runs', **arguments)
    assert not list(tmp_path.iterdir())


def test_failures_stop_no_other_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(comparison, 'train_and_evaluate', max)  # whose arguments do not compare
    recipe = Recipe('a', 'a.py', Config(), tmp_path)
    runs = [Run(recipe, seed) for seed in range(3)]
    for run in runs[1:]:
        run.folder.mkdir(parents=True)
    (runs[1].folder / 'metrics.json').write_text('{"m": 0.5}')
    (runs[2].folder / 'log.txt').write_text('Traceback\nMemoryError: too large\n\n')
    assert comparison.train_all(runs, ['m'], 1, 1) == {
        runs[0]: 'exit code 1: it said nothing',
        runs[2]: 'exit code 1: MemoryError: too large',
    }
    assert comparison.train_all(runs[1:2], ['m', 'n'], 1, 1) == {
        runs[1]: 'no n: the evaluation gave m'
    }
    (runs[1].folder / 'metrics.json').write_text('{}')
    message = 'no m: the evaluation gave no results, as where nothing is predicted'
    assert comparison.train_all(runs[1:2], ['m'], 1, 1) == {runs[1]: message}


def test_no_process_is_left_behind(tmp_path, monkeypatch):
    def interrupt(sentinels):
        assert len(multiprocessing.active_children()) == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(multiprocessing.connection, 'wait', interrupt)
    recipe = Recipe('a', 'a.py', Config(), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        comparison.train_all([Run(recipe, seed) for seed in range(3)], [], 2, 1)
    assert not multiprocessing.active_children()


def test_epochs_scale_schedules():
    cfg = Config.fromfile(COCO)
    warmup = cfg.param_scheduler[0].to_dict()
    cfg = comparison.prepare(cfg, COCO, epochs=24)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 24
    assert cfg.param_scheduler[1].milestones == [16, 22]
    assert cfg.param_scheduler[0].to_dict() == warmup
    cfg = comparison.prepare(Config.fromfile(INSTANCE), INSTANCE, epochs=2)
    assert (cfg.param_scheduler[1].end, cfg.param_scheduler[1].T_max) == (2, 2)
    cfg = Config.fromfile(INSTANCE)
    cfg.param_scheduler[1].begin = 4
    with pytest.raises(ValueError, match='search_epochs 1: nothing is left of CosineAnnealingLR'):
        comparison.prepare(cfg, INSTANCE, epochs=1, argument='search_epochs')


def test_rate_of_a_config():
    """The factor 1 leaves it as it is: the runs of a search serve without one, too."""
    cfg = Config.fromfile(INSTANCE)
    own = comparison.prepare(cfg, INSTANCE)
    assert comparison.prepare(cfg, INSTANCE, factor=1.0).to_dict() == own.to_dict()
    third = comparison.prepare(cfg, INSTANCE, factor=1 / 3)
    rate = cfg.optim_wrapper.optimizer.lr
    assert third.optim_wrapper.optimizer.lr == pytest.approx(rate / 3)
    third.optim_wrapper.optimizer.lr = rate
    assert third.to_dict() == own.to_dict()
    del cfg.optim_wrapper.optimizer.lr
    with pytest.raises(ValueError, match=rf'^rate_factors: {INSTANCE} has no optim_wrapper\.opti'):
        comparison.prepare(cfg, INSTANCE, factor=2)
