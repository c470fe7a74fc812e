import argparse
import functools
import json
from pathlib import Path

import _report
import benchmark
import pytest
import torch
from _candidates import (
    Case,
    FlexAttention,
    Step,
    UnfoldACmix,
    UnfoldPatchACmix,
    build_attention,
    build_backbone,
)

from acmix_mm.layers import ACmix, PatchACmix
from acmix_mm.ops import local_attention

ROOT = Path(__file__).resolve().parents[2]
R26 = str(ROOT / 'configs/acmix_resnet/retinanet_acmix-r26_fpn_8xb2-1x_coco.py')


@pytest.mark.parametrize('stride', [1, 2])
def test_unfold_formulation_is_the_same_operator(stride):
    """The benchmark compares equals: same outputs and gradients from the same weights."""
    ours, unfold = (cls(16, 16, stride=stride).double() for cls in (ACmix, UnfoldACmix))
    unfold.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 10, 12, dtype=torch.float64)
    torch.testing.assert_close(unfold(x), ours(x))
    for module in (ours, unfold):
        module(x).square().sum().backward()
    for a, b in zip(ours.parameters(), unfold.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_unfold_formulation_of_patch_attention_is_the_same_operator():
    """Outputs and gradients, from the same weights, with the statistics of the batch."""
    ours, unfolded = (cls(64, 16, 4).double() for cls in (PatchACmix, UnfoldPatchACmix))
    unfolded.load_state_dict(ours.state_dict())
    x = torch.randn(2, 64, 10, 12, dtype=torch.float64)
    torch.testing.assert_close(unfolded(x), ours(x))
    for module in (ours, unfolded):
        module(x).square().sum().backward()
    for a, b in zip(ours.parameters(), unfolded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_attention_candidates_are_the_same_attention():
    """By the gradients of query, key and value, which the steps leave behind."""
    case = Case((1, 2, 8, 9, 12), train=True)
    steps = [build_attention(name, None, case) for name in ('local_attention', 'unfold')]
    for step in steps:
        step()
    for a, b in zip(*(step.leaves for step in steps), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('size', [(13, 18), (7, 40)])
def test_flex_attention_has_the_same_neighbourhood_inside(size):
    """Blocks of the mask leave nothing out; without compilation, FlexAttention is plain torch."""
    maps = [torch.randn(1, 2, 8, *size, dtype=torch.float64) for _ in range(3)]
    flex = FlexAttention(size, 'cpu')
    out = torch.empty(1, 2, 8, size[0] * size[1], dtype=torch.float64)
    out[..., flex.order] = flex(*(flex.sequence(m) for m in maps)).transpose(2, 3)
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(out.unflatten(3, size)[inside], local_attention(*maps)[inside])

    index = torch.arange(size[0] * size[1])
    neighbours = flex.mask.mask_mod(0, 0, index[:, None], index)
    assert (neighbours.sum(1) == 49).all()
    blocks = flex.mask.to_dense()[0, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert blocks[: len(index), : len(index)][neighbours].all()


@pytest.mark.parametrize(
    ('arguments', 'names', 'count'),
    [
        (
            'operator --shapes 1x16x12x14 --backends auto torch --dtypes float32 bfloat16',
            {'acmix', 'acmix (torch)', 'unfold', 'conv3x3'},
            20,
        ),
        (
            'attention --shapes 1x4x8x10x12 2x4x8x7x7 --backends torch --peak-gbs 10 --no-memory',
            {'local_attention (torch)', 'unfold'},
            8,
        ),
        (
            f'backbone --shapes 1x3x64x64 --models r50 {R26} --modes train --dtypes bfloat16',
            {'r50', Path(R26).stem},
            2,
        ),
        (f'detector --shapes 64x96 --configs {R26}', {Path(R26).stem}, 2),
        ('scaling --shapes 64x64 64x96 --batches 1 2', {'acmix'}, 8),
        ('scaling --shapes 64x64 --batches 1 --model acmix-r26', {'acmix-r26'}, 4),
    ],
)
def test_suites(capsys, tmp_path, arguments, names, count):
    files = [str(tmp_path / name) for name in ('out.json', 'out.png')]
    options = ['--json', files[0], '--plot', files[1], '--no-memory', '--rounds', '1']
    benchmark.main([*arguments.split(), *options])
    content = json.loads(Path(files[0]).read_text())
    assert content['setting']['torch'] == torch.__version__
    assert len(content['rows']) == count
    assert names <= {row['candidate'] for row in content['rows']}
    for row in content['rows']:
        assert 'error' not in row
        assert len(row['times']) == 1
        assert row['times'][0] > 0
    assert Path(files[1]).stat().st_size > 5000
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last == [f'measurements: {files[0]}', f'plot: {files[1]}']


@pytest.mark.parametrize('model', ['r50', R26])
def test_all_of_a_backbone_trains(model):
    """Also what its config freezes, so that comparisons are fair."""
    step = build_backbone(model, None, 'plain', Case((2, 3, 64, 64), train=True))
    step()
    assert all(parameter.grad is not None for parameter in step.leaves)
    step.reset()
    assert all(parameter.grad is None for parameter in step.leaves)


@pytest.mark.slow
def test_memory_of_training_counts_gradients_not_weights(tmp_path):
    file, plot = tmp_path / 'out.json', tmp_path / 'out.png'
    arguments = 'backbone --shapes 1x3x64x64 --models acmix-r26 --modes train --rounds 1'
    benchmark.main([*arguments.split(), '--json', str(file), '--plot', str(plot)])
    (row,) = json.loads(file.read_text())['rows']
    assert plot.exists()
    assert row['weights'] > 30 * 2**20
    assert 1.0 < row['peak'] / row['weights'] < 2.0


def test_peak_memory_sees_the_step_only():
    """A known amount, after more of it in the step that loads code."""
    run, small = (functools.partial(torch.ones, mib * 2**18) for mib in (64, 96))
    peak = benchmark.peak_memory(1, Step, run, small, [])
    assert 63 <= peak / 2**20 <= 70


def test_measured_process_has_its_threads():
    check = 'lambda: __import__("torch").get_num_threads() == 3 or 1 / 0'
    run = functools.partial(eval, f'({check})()')
    assert benchmark.peak_memory(3, Step, run, run, []) < 2**23


def test_failure_in_the_measured_process(capfd):
    with pytest.raises(RuntimeError, match='measuring peak memory of Step'):
        benchmark.peak_memory(1, Step, functools.partial(torch.ones, -1), int, [])
    assert 'RuntimeError' in capfd.readouterr().err


def test_candidates_take_turns_and_one_may_fail():
    calls = []

    def build(name: str, case: Case) -> Step:
        if name == 'bad':
            raise ValueError('no')
        return Step(lambda: calls.append(name), int, [])

    case = Case((1,), False)
    candidates = [benchmark.Candidate(n, build, (n,), case) for n in ('a', 'bad', 'b', 'c')]
    args = argparse.Namespace(device='cpu', warmup=1, rounds=3, no_memory=True)
    rows = benchmark.run_comparison(candidates, args, lambda what: None)
    assert [row.get('error') for row in rows] == [None, 'ValueError: no', None, None]
    assert [len(row['times']) for row in rows] == [3, 0, 3, 3]
    timed = calls[3:]
    order = [n for i, n in enumerate(timed) if i == 0 or timed[i - 1] != n]
    assert ''.join(order) == 'abcbcacab'


def test_failures_are_reported_at_the_end(capsys, monkeypatch):
    good = benchmark.suite_operator

    def suite(args):
        for candidates in good(args):
            yield [*candidates, benchmark.Candidate('bad', int, (), candidates[0].case)]

    monkeypatch.setitem(benchmark.SUITES, 'operator', suite)
    arguments = 'operator --shapes 1x4x8x8 --modes forward --rounds 1 --no-memory'
    with pytest.raises(SystemExit, match='bad, 1x4x8x8, float32, forward: TypeError'):
        benchmark.main(arguments.split())
    assert 'unfold' in capsys.readouterr().out


def test_deployed_form(monkeypatch):
    deployed = []
    monkeypatch.setattr(ACmix, 'switch_to_deploy', lambda self, norm=None: deployed.append(self))
    options = '--shapes 1x3x64x64 --models r50 acmix-r26 --rounds 1 --no-memory'
    args = benchmark.parse_args(['backbone', *options.split()])
    comparisons = list(benchmark.suite_backbone(args))
    assert [[c.name for c in candidates] for candidates in comparisons] == [
        ['r50', 'acmix-r26', 'acmix-r26 deployed'],
        ['r50', 'acmix-r26'],
    ]
    candidate = comparisons[0][2]
    candidate.build(*candidate.arguments, candidate.case)()
    assert len(set(deployed)) == 8
    assert not deployed[0].training


def test_unfold_forms(monkeypatch):
    """Only where there is such a formulation, and with all its layers."""
    calls = []
    forward = UnfoldPatchACmix.forward
    monkeypatch.setattr(UnfoldPatchACmix, 'forward', lambda *a: calls.append(a) or forward(*a))
    options = '--shapes 1x3x64x64 --models san10 acmix-san10 acmix-swin-t --modes train --unfold'
    candidates = next(
        benchmark.suite_backbone(benchmark.parse_args(['backbone', *options.split()]))
    )
    names = ['san10', 'acmix-san10', 'acmix-san10 unfolded', 'acmix-swin-t']
    assert [c.name for c in candidates] == names
    for candidate, number in zip(candidates[1:3], (0, 10), strict=True):
        candidate.build(*candidate.arguments, candidate.case)()
        assert len(calls) == number


def test_forms_follow_what_a_model_has():
    """Backends and deployment where there are such layers."""
    options = '--shapes 1x3x64x64 --models r50 san10 acmix-san10 --modes forward'
    arguments = ['backbone', *options.split(), '--backends', 'auto', 'torch']
    candidates = next(benchmark.suite_backbone(benchmark.parse_args(arguments)))
    deployed = ['acmix-san10 deployed', 'acmix-san10 deployed (torch)']
    names = ['r50', 'san10', 'san10 (torch)', 'acmix-san10', 'acmix-san10 (torch)', *deployed]
    assert [c.name for c in candidates] == names


def test_models_that_cannot_be_built_are_refused(tmp_path):
    broken = tmp_path / 'broken.py'
    base = Path('configs/demo/retinanet_acmix-r26_fpn_scene-digits.py').resolve()
    broken.write_text(f"_base_ = '{base}'\nmodel = dict(backbone=dict(depth=51))")
    with pytest.raises(SystemExit, match=r'depth must be one of .* got 51'):
        benchmark.parse_args(['backbone', '--models', str(broken)])


def row(candidate: str, times: list[float], peak: int | None, **more) -> dict:
    case = {'shape': [1, 2], 'mode': 'train', 'dtype': 'float32'}
    return {'candidate': candidate, **case, 'times': times, 'peak': peak, **more}


def test_table_of_known_results():
    rows = [
        row('a', [0.1, 0.2, 0.4], 2**20, flops=1e11, bytes=1e9, weights=2**21),
        row('b', [0.5], 3 * 2**20),
        row('c', [], None, error='no'),
        row('d', [0.1], None, mode='forward'),
    ]
    table = [' '.join(line.split()) for line in _report.report(rows, (1.0, 50.0))]
    assert table[3:6] == [
        'a 200.00 ms 150.00 - 300.00 ms 1.00x 1.0 MiB 1.00x 2.0 MiB 50.0% arithmetic',
        'b 500.00 ms 500.00 - 500.00 ms 2.50x 3.0 MiB 3.00x',
        'c failed',
    ]
    assert table[-1] == 'd 100.00 ms 100.00 - 100.00 ms 1.00x'


def test_table_of_known_scaling():
    """Four times the pixels for nine times the time: three times for every doubling."""
    rows = [
        row('a', [0.1], 2**20, series='image', image=[1, 10, 10], pixels=100),
        row('a', [0.9], 2**22, series='image', image=[1, 20, 20], pixels=400),
        row('a', [], None, series='image', image=[1, 40, 40], pixels=1600, error='no'),
    ]
    table = [' '.join(line.split()) for line in _report.report_scaling(rows)]
    assert table[3:] == [
        '1x10x10 100.00 ms 1000000.0 ns 1.0 MiB 10486 B',
        '1x20x20 900.00 ms 2250000.0 ns 3.00x 4.0 MiB 10486 B 2.00x',
        '1x40x40, train failed',
    ]


def test_gpu_suite(monkeypatch):
    """What it would run; the command itself needs a GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    args = benchmark.parse_args(['gpu', '--peak-gbs', '100'])
    comparisons = list(benchmark.suite_gpu(args))
    assert len(comparisons) == (1 + 4 + 2) * 2 * 2 * 2  # shapes, batches, dtypes, modes
    cases = [candidates[0].case for candidates in comparisons]
    assert {case.shape[0] for case in cases} == {2, 16}
    assert {case.dtype for case in cases} == {'float16', 'bfloat16'}
    names = {c.name for candidates in comparisons for c in candidates}
    assert {'acmix', 'conv3x3', 'FlexAttention', 'unfold', 'r50', 'acmix-r50'} <= names
    assert benchmark.peaks_of(args, 'NVIDIA H200') == (989, 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about its absence')
@pytest.mark.parametrize('arguments', ['gpu', 'operator --device cuda'])
def test_cuda_is_refused_without_a_device(capsys, arguments):
    with pytest.raises(SystemExit):
        benchmark.main(arguments.split())
    assert "--device: 'cuda': torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('operator --rounds 0', "--rounds: '0' is not an integer above 0"),
        ('operator --shapes 1x64x20', "'1x64x20' is not BxCxHxW"),
        ('operator --shapes 1x63x20x20', 'channels must be a multiple of 4'),
        ('operator --shapes 1x64x3x20', 'height and width must be 4 or more'),
        ('operator --peak-gbs nan', "--peak-gbs: 'nan' is not a number above 0"),
        ('operator --plot x.txt', "'x.txt' must end in .png"),
        ('operator --json nowhere/x.json', 'folder nowhere does not exist'),
        ('operator --device tpu', "'tpu' is not cpu, cuda or cuda:N"),
        ('operator --backends best', "invalid choice: 'best'"),
        ('operator --dtypes int8', "invalid choice: 'int8'"),
        ('backbone --models r51', "'r51' is neither a config file nor one of acmix-r26"),
        ('backbone --models README.md', "'README.md' is neither a config file nor one of"),
        ('backbone --shapes 1x4x64x64', 'images have 3 channels'),
        ('detector --configs x.py', "'x.py': no such config file"),
        (f'detector --configs {ROOT}/configs/_base_/default_runtime.py', 'has no model'),
        (f'scaling --model {ROOT}/configs/_base_/default_runtime.py', 'has no model.backbone'),
        ('scaling --shapes 224x448 224x224', '--shapes: must grow'),
        ('scaling --batches 1 1', '--batches: must grow'),
        ('gpu --device cpu', 'the suite gpu needs cuda'),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    if arguments.startswith('gpu') and not torch.cuda.is_available():
        message = '--device'
    with pytest.raises(SystemExit):
        benchmark.parse_args(arguments.split())
    assert message in capsys.readouterr().err
