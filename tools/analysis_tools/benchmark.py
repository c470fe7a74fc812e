"""Time and peak memory of operators, backbones and detectors, side by side in one run.

Suites (each has its own --help):
  operator   the ACmix layer, as trained and deployed, its unfold formulation, nn.Conv2d 3x3
  attention  neighbourhood attention alone, by backend, at the four stages of ResNet-50; its unfold
             formulation, torch's FlexAttention, compiled, and the package NATTEN where installed
  shift      the convolution path and the ACmix layer by how they shift maps: tensor shifts, grouped
             convolution with fixed and with learned kernels, folded with fc, deployed
  backbone   whole backbones, by name or from config files: ResNet-ACmix, MMDetection's ResNet-50,
             Swin-T and PVT-S, SAN and others
  detector   whole detectors from config files: a training step, an inference
  fps        whole detectors from config files: frames a second beside parameters and FLOPs
  scaling    one model at growing images and batches: cost per pixel and for every doubling
  gpu        operator, attention, grouped convolution, SAN's aggregation and weights, and backbone
             in all dtypes at batch 2 and 16, on CUDA

Time: after warm-up, all candidates of a comparison take turns in one process, every round beginning
with another one, so that what else the machine does strikes all alike. Given are the median and the
quartiles of the rounds; steps shorter than 20 ms are repeated within a round. On CUDA, events
measure from an idle device to the step's end, launches included.

Peak memory: what a step needs at most beyond what was held before it. Gradients and outputs count;
weights, inputs and libraries do not (weights are listed beside it). On a CPU it is the first step,
but for one on a very small input, of a fresh process for each candidate, in resident memory as
Linux reports it, while the C library returns all that is freed at once (gaps in its heap, which
differ from run to run, do not count); on CUDA a step after those timed, in memory that torch's
allocator handed out.

Modes: 'forward' is in eval mode without gradients; 'train' is forward and backward, in train mode,
without the optimizer. Weights are random. Dtypes other than float32 are applied by casting inputs
and weights of operators and of attention, by autocast for whole models (backbone --half cast:
by casting, too).

Ratios are to the first candidate of the same shape, mode and dtype. A candidate that fails is
reported, the others go on, and the exit status is 1.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from acmix_mm import __version__
from acmix_mm.analysis.measuring import Candidate, measure
from acmix_mm.analysis.networks import (
    Abilities,
    abilities,
    backbone_config,
    build_backbone,
    build_detector,
    detector_costs,
    model_config,
)
from acmix_mm.analysis.operators import (
    KERNEL_SIZE,
    RIVALS,
    SHIFT_FORMS,
    attention_cost,
    build_attention,
    build_convolution_path,
    build_operator,
    build_part,
    build_shift_layer,
    operator_cost,
)
from acmix_mm.analysis.report import Peaks, plot, report, report_fps, report_scaling, shape_name
from acmix_mm.analysis.steps import DTYPES, Case
from acmix_mm.command_line import (
    Parser,
    device_type,
    keep_freed_memory,
    load_config,
    output_type,
    positive_float,
    positive_int,
    program,
)
from acmix_mm.environment import device_name
from acmix_mm.files import write_whole
from acmix_mm.ops import available_backends

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
# Backbones by name: the files that the recipes inherit.
BACKBONES = {file.stem: str(file) for file in sorted(CONFIGS.glob('_base_/backbones/*.py'))}
DEFAULT_BACKBONES = ('r50', 'acmix-r50')
RETINANET = 'configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py'
FPS_CONFIGS = [
    str(CONFIGS / f'{"acmix_" * name.startswith("acmix")}pvt/retinanet_{name}_fpn_8xb2-1x_coco.py')
    for name in ('pvt-t', 'acmix-pvt-t', 'pvt-s', 'acmix-pvt-s')
]
PAPER_FPS = """\
The paper's own figure (ACmix, CVPR 2022, Table 5) is 1.3 times the frames a second of PVT-S at
comparable AP, RetinaNet on COCO: of trained models on its own hardware, not of this run."""
FPS_SHAPES = ((320, 480),)
OPERATOR_SHAPES = ((1, 64, 200, 304),)
ATTENTION_SHAPES = (
    (1, 4, 16, 200, 304),
    (1, 4, 32, 100, 152),
    (1, 4, 64, 50, 76),
    (1, 4, 128, 25, 38),
)
SHIFT_SHAPES = (  # of ResNet-50's first stage and of Swin-T's four, at 800x1216
    (1, 4, 16, 200, 304),
    (1, 3, 32, 200, 304),
    (1, 6, 32, 100, 152),
    (1, 12, 32, 50, 76),
    (1, 24, 32, 25, 38),
)
BACKBONE_SHAPES = ((1, 3, 800, 1216), (8, 3, 224, 224))
SCALING_SHAPES = (  # each of about twice the pixels of the one before
    (224, 224),
    (256, 416),
    (384, 544),
    (544, 800),
    (768, 1184),
    (1120, 1664),
    (1600, 2400),
)
GPU_BATCHES = (2, 16)
LAYER_CHANNELS = 64  # of the layer that the suite scaling measures, at a quarter of the image

BACKEND_DEVICES = {'native': 'cpu', 'triton': 'cuda'}  # others run everywhere
# From the data sheets, by a part of the device's name: dense TFLOP/s in half precision, TFLOP/s in
# float32 outside tensor cores, GB/s. TF32, which convolutions in float32 take, is half as fast.
GPU_PEAKS = {
    'H100 80GB HBM3': (989, 67, 3350),
    'H100 PCIe': (756, 51, 2000),
    'H200': (989, 67, 4800),
}
EXAMPLES = """
examples:
  benchmark.py operator
  benchmark.py operator --backends auto torch native --shapes 1x64x100x152 --json operator.json
  benchmark.py attention --peak-tflops 0.2 --peak-gbs 25 --plot attention.png
  benchmark.py shift --shapes 1x4x16x200x304 --modes forward --plot shift.png
  benchmark.py backbone --models r50 acmix-r50 swin-t pvt-s --shapes 1x3x800x1216
  benchmark.py detector --configs configs/acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py
  benchmark.py fps --shapes 800x1216 --configs configs/swin/retinanet_swin-t_fpn_8xb2-1x_coco.py \\
      configs/acmix_swin/retinanet_acmix-swin-t_fpn_8xb2-1x_coco.py
  benchmark.py scaling --model acmix-r50 --modes forward --plot scaling.png
  benchmark.py gpu --json gpu.json --plot gpu.png
"""

# Suites: from options to comparisons, each a list of candidates that take turns.


def cases(args: argparse.Namespace, shapes: Iterator[tuple[int, ...]]) -> Iterator[Case]:
    for shape in shapes:
        for dtype in args.dtypes:
            for half in args.half if dtype != 'float32' else ['autocast']:
                for mode in args.modes:
                    yield Case(shape, mode == 'train', dtype, args.device, half == 'cast')


def backend_forms(name: str, args: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """Names and backends of the candidates that one of ours makes."""
    for backend in args.backends:
        yield (name, None) if backend == 'auto' else (f'{name} ({backend})', backend)


def suite_operator(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    for case in cases(args, args.shapes):
        forms = [(n, 'acmix', backend) for n, backend in backend_forms('acmix', args)]
        if not case.train:
            names = backend_forms('acmix deployed', args)
            forms += [(n, 'acmix deployed', backend) for n, backend in names]
        forms += [('unfold', 'unfold', None), ('conv3x3', 'conv3x3', None)]
        yield [
            Candidate(name, build_operator, (form, backend), case, operator_cost(form, case))
            for name, form, backend in forms
        ]


def suite_attention(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    for case in cases(args, args.shapes):
        forms = [(n, 'local_attention', b) for n, b in backend_forms('local_attention', args)]
        forms += [(name, name, None) for name in ('unfold', *RIVALS)]
        cost = attention_cost(case)
        yield [
            Candidate(name, build_attention, (form, backend), case, cost)
            for name, form, backend in forms
        ]


def suite_parts(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    """Other operators with kernels for GPUs, beside PyTorch's operations."""
    for case in cases(args, args.shapes):
        for name in ('group_conv', 'local_aggregation', 'patch_weights'):
            forms = {**dict(backend_forms(name, args)), f'{name} (torch)': 'torch'}
            yield [Candidate(n, build_part, (name, backend), case) for n, backend in forms.items()]


def suite_shift(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    for case in cases(args, args.shapes):
        batch, heads, dim, *size = case.shape
        layer_case = dataclasses.replace(case, shape=(batch, heads * dim, *size))
        forms = [*SHIFT_FORMS, *([] if case.train else ['deployed'])]
        named = [(form, n, backend) for form in forms for n, backend in backend_forms(form, args)]
        yield [
            Candidate(f'path, {name}', build_convolution_path, (form, backend), case)
            for form, name, backend in named
        ]
        yield [
            Candidate(f'layer, {name}', build_shift_layer, (form, heads, backend), layer_case)
            for form, name, backend in named
        ]


def model_forms(
    file: str, can: Abilities, args: argparse.Namespace, deployed: bool
) -> Iterator[tuple[str, str | None, str]]:
    """Label, backend and form of the candidates that a config file makes."""
    name = Path(file).stem
    for form, label in (('plain', name), ('deployed', f'{name} deployed')):
        if form == 'plain' or (deployed and can.deploys):
            for backend in backend_forms(label, args) if can.backends else [(label, None)]:
                yield (*backend, form)


def suite_backbone(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    for case in cases(args, args.shapes):
        yield [c for model in args.models for c in backbone_candidates(model, case, args)]


def backbone_candidates(
    file: str, case: Case, args: argparse.Namespace, notes: dict | None = None
) -> Iterator[Candidate]:
    can = abilities(backbone_config, file)
    forms = [*model_forms(file, can, args, deployed=not case.train)]
    if args.unfold and can.unfolds:
        forms.append((f'{Path(file).stem} unfolded', None, 'unfolded'))
    for label, backend, form in forms:
        yield Candidate(label, build_backbone, (file, backend, form), case, notes or {})


def suite_detector(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    for case in cases(args, args.shapes):
        yield [
            Candidate(label, build_detector, (config, backend, form), case)
            for config in args.configs
            for label, backend, form in model_forms(
                config, abilities(model_config, config), args, deployed=False
            )
        ]


def suite_fps(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    for case in cases(args, args.shapes):
        yield [
            Candidate(
                label, build_detector, (config, backend, form), case,
                detector_costs(config, form, case.shape),
            )
            for config in tqdm(args.configs, desc='parameters and FLOPs', leave=False)
            for label, backend, form in model_forms(
                config, abilities(model_config, config), args, deployed=True
            )
        ]  # fmt: skip


def suite_scaling(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    height, width = args.shapes[0]
    series = {
        'image': [(1, *image) for image in args.shapes],
        'batch': [(batch, height, width) for batch in args.batches],
    }
    for axis, images in series.items():
        for dtype in args.dtypes:
            for mode in args.modes:
                candidates = []
                for image in images:
                    batch, height, width = image
                    notes = {'series': axis, 'image': list(image), 'pixels': math.prod(image)}
                    if args.model == 'acmix':
                        shape = (batch, LAYER_CHANNELS, -(-height // 4), -(-width // 4))
                        case = Case(shape, mode == 'train', dtype, args.device)
                        candidates += [
                            Candidate(name, build_operator, ('acmix', backend), case, notes)
                            for name, backend in backend_forms('acmix', args)
                        ]
                    else:
                        shape = (batch, 3, height, width)
                        case = Case(shape, mode == 'train', dtype, args.device)
                        forms = list(backbone_candidates(args.model, case, args, notes))
                        candidates += [c for c in forms if c.arguments[2] == 'plain']
                yield candidates


def suite_gpu(args: argparse.Namespace) -> Iterator[list[Candidate]]:
    suites = (
        (suite_operator, OPERATOR_SHAPES),
        (suite_attention, ATTENTION_SHAPES),
        (suite_parts, OPERATOR_SHAPES),
        (suite_backbone, BACKBONE_SHAPES),
    )
    for suite, shapes in suites:
        for batch in args.batches:
            options = {**vars(args), 'shapes': [(batch, *shape[1:]) for shape in shapes]}
            yield from suite(argparse.Namespace(**options))


SUITES = {
    'operator': suite_operator,
    'attention': suite_attention,
    'shift': suite_shift,
    'backbone': suite_backbone,
    'detector': suite_detector,
    'fps': suite_fps,
    'scaling': suite_scaling,
    'gpu': suite_gpu,
}

# Options.


def shape_type(axes: str, minimum: int, text: str) -> tuple[int, ...]:
    """A shape such as 1x64x200x304 for ``axes`` 'BxCxHxW', with H and W of at least ``minimum``."""
    parts = text.lower().split('x')
    names = axes.split('x')
    if len(parts) != len(names) or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f'{text!r} is not {axes} in integers above 0')
    shape = tuple(map(int, parts))
    if min(shape[-2:]) < minimum:
        raise argparse.ArgumentTypeError(f'{text!r}: height and width must be {minimum} or more')
    for name, value in zip(names, shape, strict=True):
        if name == 'C' and value % 4:
            raise argparse.ArgumentTypeError(f'{text!r}: channels must be a multiple of 4 (heads)')
        if name == '3' and value != 3:
            raise argparse.ArgumentTypeError(f'{text!r}: images have 3 channels')
    return shape


def config_type(text: str) -> str:
    if Path(text).suffix != '.py' or not Path(text).is_file():
        raise argparse.ArgumentTypeError(f'{text!r}: no such config file')
    if 'model' not in load_config(text):
        raise argparse.ArgumentTypeError(f'{text!r} has no model')
    return text


def model_type(more: tuple[str, ...], text: str) -> str:
    """A backbone's name or a config file, as the file."""
    if text in more:
        return text
    if text in BACKBONES:
        return BACKBONES[text]
    if Path(text).suffix == '.py' and Path(text).is_file():
        cfg = load_config(text)
        if 'backbone' not in cfg and 'backbone' not in cfg.get('model', {}):
            raise argparse.ArgumentTypeError(f'{text!r} has no model.backbone')
        return text
    names = ', '.join((*more, *BACKBONES))
    raise argparse.ArgumentTypeError(f'{text!r} is neither a config file nor one of {names}')


def add_common(
    parser: argparse.ArgumentParser, dtypes: list[str], device: str = 'cpu', choice: bool = True
) -> None:
    """Options of all suites; without ``choice`` what is measured is the time forward."""
    parser.add_argument(
        '--backends', nargs='+', choices=('auto', *available_backends()), metavar='NAME',
        help='backends of the ACmix layers to compare, auto (the automatic choice) or '
        f'{", ".join(available_backends())}; default: auto, for attention all that the device has',
    )  # fmt: skip
    if choice:
        parser.add_argument(
            '--modes', nargs='+', choices=('forward', 'train'), default=['forward', 'train'],
            metavar='MODE', help='of forward, train; default: both',
        )  # fmt: skip
        parser.add_argument('--no-memory', action='store_true', help='measure time only')
    else:
        parser.set_defaults(modes=['forward'], no_memory=True)
    parser.add_argument(
        '--dtypes', '--dtype', nargs='+', choices=tuple(DTYPES), default=dtypes,
        metavar='DTYPE', help=f'of {", ".join(DTYPES)}; by casting or autocast, see the main help; '
        f'default: {" ".join(dtypes)}',
    )  # fmt: skip
    parser.add_argument(
        '--device', type=device_type, default=device, help='cpu, cuda or cuda:N (%(default)s)'
    )
    parser.add_argument(
        '--threads', type=positive_int, default=torch.get_num_threads(), metavar='N',
        help='CPU threads (%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--rounds', type=positive_int, default=7, metavar='N', help='timed rounds (%(default)s)'
    )
    parser.add_argument(
        '--warmup', type=positive_int, default=2, metavar='N',
        help='untimed steps before (%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--malloc', choices=('keep', 'default'), default='keep',
        help="keep: the GNU C library keeps freed memory, as the tools' processes do; default: its "
        'own policy, with page faults for every large tensor; on a CPU (%(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--json', type=functools.partial(output_type, ('.json',)), metavar='FILE.json',
        help='write setting and all measurements; brought up to date after every comparison',
    )  # fmt: skip
    parser.add_argument(
        '--plot', type=functools.partial(output_type, ('.png', '.svg', '.pdf')),
        metavar='FILE.png', help='write a plot (.png, .svg or .pdf)',
    )  # fmt: skip


def add_shapes(parser: argparse.ArgumentParser, axes: str, default: tuple, minimum: int) -> None:
    parser.add_argument(
        '--shapes', '--shape', '--sizes', '--size', nargs='+', default=list(default), metavar=axes,
        type=functools.partial(shape_type, axes, minimum),
        help='default: ' + ' '.join(map(shape_name, default)),
    )  # fmt: skip


def add_peaks(parser: argparse.ArgumentParser, default: str) -> None:
    group = parser.add_argument_group(
        'floor',
        'With either of these, the table tells which part of the time the device would need at\n'
        'least, by arithmetic or by memory traffic, whichever is more. Attention:\n'
        f'4 k^2 B N d H W operations forward, 12 in training (k = {KERNEL_SIZE}); 4 maps read or\n'
        'written forward, 11 in training. Operators: see operator_cost() in acmix_mm.analysis.\n'
        'The suite gpu knows some devices, and takes attention for arithmetic in float32 outside\n'
        'tensor cores: on an H100, 64x200x304 in float16, 11.4 us, and 9.3 us of memory traffic.',
    )
    for option, unit in (('--peak-tflops', '10^12 operations/s'), ('--peak-gbs', '10^9 bytes/s')):
        group.add_argument(
            option, type=positive_float, metavar='X', help=f'peak of the device, {unit}{default}'
        )


def make_parser() -> argparse.ArgumentParser:
    options = {'formatter_class': argparse.RawDescriptionHelpFormatter, 'allow_abbrev': False}
    parser = Parser(description=__doc__, epilog=EXAMPLES, **options)
    suites = parser.add_subparsers(dest='suite', required=True, metavar='SUITE')

    def add(name: str, description: str, dtypes: tuple[str, ...] = ('float32',)):
        suite = suites.add_parser(name, description=description, **options)
        suite.set_defaults(unfold=False, half=['autocast'])
        device = 'cuda' if name == 'gpu' else 'cpu'
        add_common(suite, list(dtypes), device, choice=name != 'fps')
        return suite

    suite = add('operator', 'The ACmix layer, its unfold formulation and nn.Conv2d 3x3 on a map.')
    add_shapes(suite, 'BxCxHxW', OPERATOR_SHAPES, 4)
    add_peaks(suite, '')
    suite = add(
        'attention',
        'Neighbourhood attention alone (d channels for each of N heads), without projections.\n'
        'Before it is measured, each must give the results and gradients of ours.\n'
        'FlexAttention gets its maps as sequences in tiles of 8x16 pixels, NATTEN with channels\n'
        'last; making them is not counted, reflection at the border is. On CPUs, FlexAttention\n'
        'has no backward, and NATTEN no kernels: it is measured at small maps, forward.',
    )
    add_shapes(suite, 'BxNxdxHxW', ATTENTION_SHAPES, KERNEL_SIZE)
    add_peaks(suite, '')
    suite = add(
        'shift',
        'The convolution path alone, of projected maps (d channels for each of N heads), and the\n'
        'layer ACmix of N heads on N d channels, by how they shift maps:\n'
        '  tensor shifts     after fc, maps are padded, sliced and added\n'
        '  fixed kernels     the same by a grouped convolution, one kernel for each head position\n'
        '  one kernel group  as many kernels, learned\n'
        '  learned kernels   N kernels for each head position, as published\n'
        '  ..., folded       fc is multiplied into the kernels\n'
        '  deployed          learned kernels for inference, folded where that saves operations',
    )
    add_shapes(suite, 'BxNxdxHxW', SHIFT_SHAPES, KERNEL_SIZE)
    suite = add(
        'backbone',
        'Whole backbones. Training: the loss is the sum of the means of the outputs; nothing is\n'
        'frozen, BatchNorm uses the statistics of the batch.',
    )
    add_shapes(suite, 'Bx3xHxW', BACKBONE_SHAPES, 64)
    names = ', '.join(BACKBONES)
    suite.add_argument(
        '--models', nargs='+', metavar='MODEL',
        default=[BACKBONES[name] for name in DEFAULT_BACKBONES],
        type=functools.partial(model_type, ()),
        help=f'of {names}, or a config file, of which the backbone is taken (r50 acmix-r50)',
    )  # fmt: skip
    suite.add_argument(
        '--unfold', action='store_true',
        help='also ResNet-ACmix and SAN-ACmix by copying neighbourhoods into memory (unfold)',
    )  # fmt: skip
    suite.add_argument(
        '--half', nargs='+', choices=('autocast', 'cast'), default=['autocast'], metavar='HOW',
        help='how dtypes other than float32 are applied, of autocast and cast (weights and images '
        'in that dtype); default: autocast',
    )  # fmt: skip
    suite = add('detector', 'Whole detectors: a training step and an inference on one image.')
    add_shapes(suite, 'HxW', ((800, 1216),), 64)
    suite.add_argument(
        '--configs', '--config', nargs='+', type=config_type, default=[RETINANET], metavar='FILE',
        help=f'default: {RETINANET}',
    )  # fmt: skip
    suite = add(
        'fps',
        'Frames a second of whole detectors: inference on one image, from pixels to boxes, beside\n'
        'parameters and FLOPs (those of complexity.py), also in the form for inference. Weights\n'
        'are the initial ones, whose scores stay below the threshold of boxes: the suppression at\n'
        'the end has nothing to do, alike for all.',
    )
    add_shapes(suite, 'HxW', FPS_SHAPES, 64)
    suite.add_argument(
        '--configs', '--config', nargs='+', type=config_type, default=FPS_CONFIGS,
        metavar='FILE', help='default: RetinaNet with PVT-T, PVT-ACmix-T, PVT-S and PVT-ACmix-S',
    )  # fmt: skip
    suite = add(
        'scaling',
        'One model at growing images (batch 1) and growing batches (of the first image): cost per\n'
        'pixel of the image, and the factor for every doubling of pixels. The layer acmix gets\n'
        f'{LAYER_CHANNELS} channels at a quarter of the image, as in stage 1 of ResNet-50.',
    )
    add_shapes(suite, 'HxW', SCALING_SHAPES, 64)
    suite.add_argument(
        '--batches', nargs='+', type=positive_int, default=[1, 2, 4, 8], metavar='B',
        help='default: 1 2 4 8',
    )  # fmt: skip
    suite.add_argument(
        '--model', default='acmix', type=functools.partial(model_type, ('acmix',)),
        help=f'acmix (the layer; default), {names}, or a config file',
    )  # fmt: skip
    suite = add(
        'gpu',
        'operator, attention and backbone at their default shapes, on CUDA.\n'
        'This takes long: --dtypes and --batches divide it, --json keeps what is measured so far.',
        ('float16', 'bfloat16', 'float32'),
    )
    suite.add_argument(
        '--batches', nargs='+', type=positive_int, default=list(GPU_BATCHES), metavar='B',
        help='default: ' + ' '.join(map(str, GPU_BATCHES)),
    )  # fmt: skip
    add_peaks(suite, f' (known for {", ".join(GPU_PEAKS)})')
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    kind = args.device.split(':')[0]
    if args.suite == 'gpu':
        if kind != 'cuda':
            parser.error(f'argument --device: the suite gpu needs cuda, got {args.device!r}')
        args.models = [BACKBONES[name] for name in DEFAULT_BACKBONES]
    if args.backends is None:
        args.backends = ['auto']
        if args.suite == 'attention':
            names = available_backends()
            suited = [n for n in names if BACKEND_DEVICES.get(n, kind) == kind]
            args.backends = suited[::-1]  # the special ones first
    for backend in args.backends:
        needed = BACKEND_DEVICES.get(backend, kind)
        if needed != kind:
            parser.error(f'argument --backends: {backend!r} needs --device {needed}, got {kind}')
    if kind == 'cpu' and not args.no_memory and not Path('/proc/self/clear_refs').exists():
        parser.error('peak memory on a CPU needs Linux; choose --no-memory')
    if args.suite == 'scaling':
        pixels = [math.prod(shape) for shape in args.shapes]
        for option, values in (('shapes', pixels), ('batches', args.batches)):
            if sorted(set(values)) != values:
                parser.error(f'argument --{option}: must grow from one to the next, got {values}')
    if kind == 'cuda':
        torch.cuda.set_device(torch.device(args.device))
    return args


def peaks_of(args: argparse.Namespace, name: str) -> Peaks:
    """As given, or those of a known GPU in the suite gpu."""
    tflops, gbs = getattr(args, 'peak_tflops', None), getattr(args, 'peak_gbs', None)
    peaks = Peaks({} if tflops is None else dict.fromkeys(DTYPES, tflops), gbs)
    for part, (half, float32, bandwidth) in GPU_PEAKS.items():
        if args.suite == 'gpu' and part in name:
            known = {'float32': half / 2, 'bfloat16': half, 'float16': half}
            return Peaks(peaks.tflops or known, gbs or bandwidth, float32)
    return peaks


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.malloc == 'keep':
        keep_freed_memory()
    name = device_name(args.device)
    peaks = peaks_of(args, name)
    setting = {
        'suite': args.suite,
        'date': datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
        'acmix_mm': __version__,
        'torch': torch.__version__,
        'device': name,
        'machine': platform.machine(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'backends': available_backends(),
        'threads': args.threads,
        'malloc': args.malloc,
        'rounds': args.rounds,
        'peaks': dataclasses.asdict(peaks),
        'arguments': sys.argv[1:] if argv is None else argv,
    }
    print('\n'.join(f'{key}: {value}' for key, value in setting.items()), flush=True)

    comparisons = list(SUITES[args.suite](args))
    per_candidate = 1 if args.no_memory or args.device != 'cpu' else 2
    total = sum(args.rounds + per_candidate * len(candidates) for candidates in comparisons)
    rows = []
    with tqdm(total=total, leave=False) as bar:

        def advance(what: str) -> None:
            bar.set_description(what, refresh=False)
            bar.update()

        for candidates in comparisons:
            rows += measure(
                candidates, args.rounds, args.warmup, not args.no_memory, args.threads, advance
            )
            if args.json is not None:
                write_whole(args.json, json.dumps({'setting': setting, 'rows': rows}, indent=1))

    print()
    if args.suite == 'fps':
        print(*report_fps(rows), '', PAPER_FPS, sep='\n')
    else:
        print(*(report_scaling(rows) if args.suite == 'scaling' else report(rows, peaks)), sep='\n')
    print()
    if args.json is not None:
        print(f'measurements: {args.json}')
    if args.plot is not None:
        plot(rows, setting, args.plot)
        print(f'plot: {args.plot}')
    failures = [
        f'  {row["candidate"]}, {shape_name(row["shape"])}, {row["dtype"]}, {row["mode"]}: '
        f'{row["error"]}'
        for row in rows
        if 'error' in row
    ]
    if failures:
        sys.exit('\n'.join(['failed:', *failures]))


if __name__ == '__main__':
    main()
