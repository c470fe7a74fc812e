import json
import re
import sys
from pathlib import Path

import benchmark
import pytest
import torch
from mmengine.config import Config

from acmix_mm import deploy
from acmix_mm.analysis import measuring
from acmix_mm.analysis.baselines import UnfoldPatchACmix
from acmix_mm.analysis.costs import network_costs
from acmix_mm.analysis.networks import detector_costs, initial_model
from acmix_mm.analysis.operators import RIVALS, attention_cost
from acmix_mm.analysis.report import floor_fraction
from acmix_mm.analysis.steps import Case
from acmix_mm.layers import ACmix

ROOT = Path(__file__).resolve().parents[2]
R26 = str(ROOT / 'configs/acmix_resnet/retinanet_acmix-r26_fpn_8xb2-1x_coco.py')


@pytest.mark.parametrize(
    ('arguments', 'names', 'count'),
    [
        (
            'operator --shapes 1x16x12x14 --backends auto torch --dtypes float32 bfloat16',
            {'acmix', 'acmix (torch)', 'unfold', 'conv3x3'},
            20,
        ),
        (
            'shift --shapes 1x4x8x12x14',
            {'path, tensor shifts', 'path, learned kernels, folded', 'layer, deployed'},
            26,
        ),
        (
            f'backbone --shapes 1x3x64x64 --models r50 {R26} --modes train --dtypes bfloat16 '
            '--half autocast cast',
            {'r50', Path(R26).stem},
            4,
        ),
        (f'detector --shapes 64x96 --configs {R26}', {Path(R26).stem}, 2),
        (
            f'fps --shapes 64x96 --configs {R26}',
            {Path(R26).stem, f'{Path(R26).stem} deployed'},
            2,
        ),
        ('scaling --shapes 64x64 64x96 --batches 1 2', {'acmix'}, 8),
        ('scaling --shapes 64x64 --batches 1 --model acmix-r26', {'acmix-r26'}, 4),
    ],
)
def test_suites(capsys, tmp_path, arguments, names, count):
    files = [str(tmp_path / name) for name in ('out.json', 'out.png')]
    options = ['--json', files[0], '--plot', files[1], '--rounds', '1']
    options += [] if arguments.startswith('fps') else ['--no-memory']
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


def test_attention_of_other_packages(capsys, monkeypatch, tmp_path):
    """What is not there says so in its row, and is no failure."""
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)  # takes a minute
    monkeypatch.setitem(sys.modules, 'natten', None)
    file = tmp_path / 'out.json'
    options = '--shapes 1x4x8x10x12 2x4x8x7x7 --backends torch --peak-gbs 10 --rounds 1 --no-memory'
    benchmark.main(['attention', *options.split(), '--json', str(file)])
    rows = json.loads(file.read_text())['rows']
    names = ['local_attention (torch)', 'unfold', 'FlexAttention', 'NATTEN']
    assert [row['candidate'] for row in rows] == names * 4
    for row in rows:
        assert 'error' not in row
        reason = {
            ('FlexAttention', 'train'): 'no backward on CPUs',
            ('NATTEN', 'train'): 'not installed',
            ('NATTEN', 'forward'): 'not installed',
        }.get((row['candidate'], row['mode']))
        assert row.get('unavailable') == reason
        assert len(row['times']) == (reason is None)
    out = capsys.readouterr().out
    assert len(re.findall(r'^  NATTEN +not installed$', out, re.MULTILINE)) == 4
    assert len(re.findall(r'^  FlexAttention +no backward on CPUs$', out, re.MULTILINE)) == 2
    assert len(re.findall(r'% bandwidth$', out, re.MULTILINE)) == 10


def test_attention_at_the_stages_of_resnet50():
    comparisons = list(benchmark.suite_attention(benchmark.parse_args(['attention'])))
    shapes = [candidates[0].case.shape for candidates in comparisons[::2]]
    sides = [(height, width) for _, _, _, height, width in shapes]
    assert sides == [(-(-800 // stride), -(-1216 // stride)) for stride in (4, 8, 16, 32)]
    assert [(heads, dim) for _, heads, dim, _, _ in shapes] == [(4, d) for d in (16, 32, 64, 128)]


def test_backbones_in_half_precision():
    """By autocast weights and their gradients are float32, by casting they are not."""
    arguments = 'backbone --shapes 1x3x64x64 --models acmix-r26 --modes forward train '
    arguments += '--dtypes float32 bfloat16 --half autocast cast'
    comparisons = list(benchmark.suite_backbone(benchmark.parse_args(arguments.split())))
    names = [candidates[0].row()['dtype'] for candidates in comparisons]
    assert names == [n for n in ('float32', 'bfloat16', 'bfloat16 (cast)') for _ in range(2)]
    gradients = []
    for candidate in (comparisons[i][0] for i in (1, 3, 5)):
        step = candidate.build(*candidate.arguments, candidate.case)
        step()
        gradients.append(step.leaves[0].grad)
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32, torch.bfloat16]
    assert gradients[0].abs().max() > 0


@pytest.mark.slow
def test_memory_of_training_counts_gradients_not_weights(tmp_path):
    file, plot = tmp_path / 'out.json', tmp_path / 'out.png'
    arguments = 'backbone --shapes 1x3x64x64 --models acmix-r26 --modes train --rounds 1'
    benchmark.main([*arguments.split(), '--json', str(file), '--plot', str(plot)])
    (row,) = json.loads(file.read_text())['rows']
    assert plot.exists()
    assert row['weights'] > 30 * 2**20
    assert 1.0 < row['peak'] / row['weights'] < 2.0


def test_failures_are_reported_at_the_end(capsys, monkeypatch):
    good = benchmark.suite_operator

    def suite(args):
        for candidates in good(args):
            yield [*candidates, measuring.Candidate('bad', int, (), candidates[0].case)]

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


def test_forms_of_the_shift():
    """The path and the layer by turns, deployed in evaluation only."""
    arguments = 'shift --shapes 2x3x8x12x14 --backends auto torch'
    comparisons = list(benchmark.suite_shift(benchmark.parse_args(arguments.split())))
    shapes = [{candidate.case.shape for candidate in candidates} for candidates in comparisons]
    assert shapes == [{(2, 3, 8, 12, 14)}, {(2, 24, 12, 14)}] * 2
    modes = [candidates[0].case.mode for candidates in comparisons]
    assert modes == ['forward', 'forward', 'train', 'train']
    assert [len(candidates) for candidates in comparisons] == [14, 14, 12, 12]
    names = [c.name for c in comparisons[0]]
    assert names[:2] == ['path, tensor shifts', 'path, tensor shifts (torch)']
    assert names[-1] == 'path, deployed (torch)'


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


def test_frames_a_second_beside_costs(capsys):
    """Of each form those that complexity.py has; the paper's figure is named."""
    stem = Path(R26).stem
    options = f'--shapes 64x96 --configs {R26} --rounds 1'
    (candidates,) = benchmark.suite_fps(benchmark.parse_args(['fps', *options.split()]))
    assert [c.name for c in candidates] == [stem, f'{stem} deployed']
    assert all(c.case.mode == 'forward' for c in candidates)
    model = initial_model(Config.fromfile(R26))
    for candidate in candidates:
        whole = network_costs(model, (64, 96)).whole
        assert candidate.notes == {'parameters': whole.parameters, 'flops': whole.flops}
        deploy(model)
    step = candidates[1].build(*candidates[1].arguments, candidates[1].case)
    assert len(step.leaves) == len(list(model.parameters()))
    benchmark.main(['fps', *options.split()])
    out = capsys.readouterr().out
    assert re.search(rf'^  {stem} deployed +[\d.]+ +[\d.]+ - [\d.]+ +[\d.]+x +', out, re.MULTILINE)
    assert 'Table 5) is 1.3 times the frames a second of PVT-S' in out


def test_frames_a_second_of_the_paper():
    """What it would compare; a failure to count does not keep the others from being measured."""
    args = benchmark.parse_args(['fps'])
    assert args.modes == ['forward']
    assert args.no_memory
    names = [Path(file).stem.split('_')[1] for file in args.configs]
    assert names == ['pvt-t', 'acmix-pvt-t', 'pvt-s', 'acmix-pvt-s']
    assert all(Path(file).is_file() for file in args.configs)
    assert detector_costs('none.py', 'plain', (64, 64)) == {}


def test_models_that_cannot_be_built_are_refused(tmp_path):
    broken = tmp_path / 'broken.py'
    base = Path('configs/demo/retinanet_acmix-r26_fpn_scene-digits.py').resolve()
    broken.write_text(f"_base_ = '{base}'\nmodel = dict(backbone=dict(depth=51))")
    with pytest.raises(SystemExit, match=r'depth must be one of .* got 51'):
        benchmark.parse_args(['backbone', '--models', str(broken)])


def test_gpu_suite(monkeypatch):
    """What it would run; the command itself needs a GPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda device: None)
    args = benchmark.parse_args(['gpu', '--peak-gbs', '100'])
    comparisons = list(benchmark.suite_gpu(args))
    assert len(comparisons) == (1 + 4 + 3 + 2) * 2 * 3 * 2  # shapes, batches, dtypes, modes
    cases = [candidates[0].case for candidates in comparisons]
    assert {case.shape[0] for case in cases} == {2, 16}
    assert {case.dtype for case in cases} == {'float16', 'bfloat16', 'float32'}
    names = {c.name for candidates in comparisons for c in candidates}
    assert {'acmix', 'conv3x3', 'unfold', 'r50', 'acmix-r50', *RIVALS} <= names
    for part in ('group_conv', 'local_aggregation', 'patch_weights'):
        assert {part, f'{part} (torch)'} <= names
    peaks = benchmark.peaks_of(args, 'NVIDIA H200')
    assert (peaks.tflops['float16'], peaks.gbs) == (989, 100)


def test_floor_of_a_known_gpu():
    """64x200x304 in float16 on an H100: 31 MB of traffic, and 0.76 * 10^9 operations in float32."""
    args = benchmark.argparse.Namespace(suite='gpu')
    peaks = benchmark.peaks_of(args, 'NVIDIA H100 80GB HBM3')
    case = Case((1, 4, 16, 200, 304), train=False, dtype='float16', device='cuda')
    row = {'dtype': 'float16', 'times': [22.78e-6], **attention_cost(case)}
    assert floor_fraction(row, peaks) == '50.0% float32 arithmetic'
    assert floor_fraction({**row, 'attention_flops': 0}, peaks) == '40.8% bandwidth'


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
        ('backbone --models r51', "'r51' is neither a config file nor one of acmix-pvt-s"),
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
