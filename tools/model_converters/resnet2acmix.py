"""Make a start for ResNet-ACmix from the weights of a plain ResNet with bottlenecks.

CHECKPOINT is torchvision's, mmpretrain's, or a detector's or segmentor's; depth and width are read
from it. OUT has names as ACmixResNet in such a model has them (`backbone.*`); a torchvision
classifier's `fc.*` becomes `head.fc.*`, all else is carried over as it is.

Everything but the 3x3 kernels is copied. Each of those is approximated by ACmix's convolution path,
of which 4 output channels share 9 projected maps; which ones do is chosen, and the norm and the 1x1
convolution behind are permuted to match. The attention path starts with a small rate.

With --images, every layer in turn is fitted to the plain network's outputs on them, and norms get
new statistics; some images are held out to measure the errors on. Without, kernels are fitted as
they are.
"""

import argparse
import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from _kernel_fit import (
    Factors,
    Statistics,
    alternate,
    energy_beyond,
    group_outputs,
    measure,
    spectra,
    truncate,
)
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from acmix_mm.checkpoints import state_dict_of
from acmix_mm.command_line import (
    Parser,
    check_out,
    find_images,
    keep_freed_memory,
    load_checkpoint,
    program,
)
from acmix_mm.files import write_checkpoint, write_figure

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # RGB, as torchvision and mmdet
HELD_OUT = 5  # every fifth image measures the errors
HEADS, RANK = 4, 9  # of ACmixResNet: 3 x 3 maps lead to 4 channels
ATTENTION_RATE = 0.1  # a trained ResNet-26's features deviate by 0.021 with 0, 0.024 with it
RIDGE = 0.01  # few images leave much of a kernel undetermined; 0.001 to 0.1 make no difference
BATCH = 16
PARAMETER = re.compile(
    r'(conv1\.weight|bn1\.\w+|layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.\w+'
    r'|downsample\.0\.weight|downsample\.1\.\w+))'
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help="plain ResNet's checkpoint (stride in the 3x3s)")
    parser.add_argument('out', type=Path, metavar='OUT.pth', help='file to write; must not exist')
    parser.add_argument(
        '--images', type=Path, help='folder of images (also below it) like those to be trained on'
    )
    parser.add_argument('--num-images', type=int, default=80, help='default: %(default)s')
    parser.add_argument(
        '--size',
        type=int,
        default=224,
        help='pixels of the square that is cut out of an image, after its shorter side is resized '
        'to them (default: %(default)s)',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--plot', type=Path, metavar='FILE.png', help='picture of the spectra of the kernels'
    )
    args = parser.parse_args(argv)
    if args.num_images < 2:
        parser.error(f'--num-images must be at least 2, got {args.num_images}')
    if args.size < 32:
        parser.error(f'--size must be at least 32, got {args.size}')
    check_out(args.out, '.pth')
    if args.plot is not None:
        check_out(args.plot, '.png')
    return args


def split_weights(weights: dict, file: str) -> tuple[dict, dict]:
    """The ResNet's weights by mmdet's names, and all others by those they are to have."""
    wrapped = any(name.startswith('backbone.') for name in weights)
    backbone, others = {}, {}
    for name, value in weights.items():
        if not wrapped and name in ('fc.weight', 'fc.bias'):
            others[f'head.{name}'] = value
        elif wrapped and not name.startswith('backbone.'):
            others[name] = value
        else:
            backbone[name.removeprefix('backbone.')] = value
    if any(name.endswith('.rate1') for name in backbone):
        sys.exit(f'error: {file} is a mixed network already')
    if 'layer1.0.conv2.weight' in backbone and 'layer1.0.conv3.weight' not in backbone:
        sys.exit(
            f'error: {file} has basic blocks (ResNet-18 or -34); ResNet-ACmix has bottlenecks '
            '(26, 38, 50, 101)'
        )
    strange = [name for name in backbone if not PARAMETER.fullmatch(name)]
    if strange or 'layer4.0.conv3.weight' not in backbone:
        what = f'has {strange[0]}' if strange else 'lacks layer4.0.conv3.weight'
        sys.exit(f'error: {file} is no plain ResNet: it {what}')
    return backbone, others


def build_networks(weights: dict, file: str) -> tuple[nn.Module, nn.Module]:
    """The plain network, and ResNet-ACmix with all of its weights but the 3x3 kernels."""
    from acmix_mm.backbones import ACmixResNet

    blocks = tuple(
        len({name.split('.')[1] for name in weights if name.startswith(f'layer{stage}.')})
        for stage in (1, 2, 3, 4)
    )
    depths = {blocks: depth for depth, (_, blocks) in ACmixResNet.arch_settings.items()}
    if blocks not in depths:
        sys.exit(f'error: {file} has stages of {blocks} blocks, not one of {list(depths)}')
    stem = weights['conv1.weight']
    arguments = {
        'depth': depths[blocks],
        'in_channels': stem.size(1),
        'stem_channels': stem.size(0),
        'base_channels': weights['layer1.0.conv1.weight'].size(0),
    }
    try:
        plain = ACmixResNet(**arguments, stage_with_acmix=(False,) * 4).eval()
        mixed = ACmixResNet(**arguments).eval()
    except ValueError as error:
        sys.exit(f'error: {file} does not fit ResNet-ACmix: {error}')
    state = plain.state_dict()
    # Files from before PyTorch 0.4.1 do not have these counters.
    missing = [n for n in state if n not in weights and not n.endswith('num_batches_tracked')]
    wrong = [n for n, v in weights.items() if n in state and state[n].shape != v.shape]
    infinite = [n for n, v in weights.items() if not v.isfinite().all()]
    for names, what in (
        (missing, 'is missing'),
        (wrong, 'has another shape'),
        (infinite, 'is not finite'),
    ):
        if names:
            sys.exit(f'error: {file} is no plain ResNet-{depths[blocks]}: {names[0]} {what}')
    plain.load_state_dict(weights, strict=False)
    shared = {n: v for n, v in plain.state_dict().items() if n in mixed.state_dict()}
    mixed.load_state_dict({**mixed.state_dict(), **shared})
    return plain, mixed


def load_images(args: argparse.Namespace) -> Tensor:
    """Normalised images in a random order, (B, 3, size, size)."""
    files = find_images(args.images, '**/*', least=2)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(args.seed))
    images = []
    for index in tqdm(order[: args.num_images].tolist(), desc='read images', unit='image'):
        try:
            image = Image.open(files[index]).convert('RGB')
        except (OSError, UnidentifiedImageError):
            sys.exit(f'error: image {files[index]} cannot be read')
        scale = args.size / min(image.size)
        width, height = (max(args.size, round(side * scale)) for side in image.size)
        left, top = (width - args.size) // 2, (height - args.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + args.size, top + args.size))
        images.append((np.asarray(image, dtype=np.float32) - MEAN) / STD)
    return torch.from_numpy(np.stack(images)).float().permute(0, 3, 1, 2).contiguous()


def bottlenecks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the blocks, in their order."""
    for stage in network.res_layers:
        for index, block in enumerate(getattr(network, stage)):
            yield f'{stage}.{index}', block


def importance(block: nn.Module) -> Tensor:
    """Factor on the error of every output of the 3x3 convolution: what follows makes of it."""
    scale = block.norm2.weight / (block.norm2.running_var + block.norm2.eps).sqrt()
    factor = scale.abs() * block.conv3.weight.flatten(1).norm(dim=0)
    # A channel that the block ignores still needs a kernel, from which training can begin.
    return factor.double().clamp_min(1e-3 * factor.mean().clamp_min(1e-6))[:, None, None]


def fit(
    theirs: nn.Module, block: nn.Module, statistics: Statistics | None, generator: torch.Generator
) -> dict:
    """Fit a block's operator to the other's 3x3 convolution, in place.

    Args:
        theirs (nn.Module): The plain network's block.
        block (nn.Module): The mixed network's.
        statistics (Statistics | None): Of the mixed network's input and the wanted outputs. None:
            all inputs count alike.
        generator (torch.Generator): For what is drawn at random.

    Returns:
        dict: ``kernel``, every output's times its importance; ``groups`` of outputs;
        ``kernel error``, relative.
    """
    weight = importance(theirs)
    kernel = theirs.conv2.weight.double().flatten(2).transpose(1, 2) * weight
    if statistics is None:
        groups = group_outputs(kernel, HEADS, RANK, generator)
        factors = truncate(kernel, groups, RANK)
    else:
        statistics = Statistics(statistics.patches, statistics.outputs * weight)
        statistics = statistics.pulled_to(kernel, RIDGE)
        # If all taps saw independent inputs of one covariance, truncation would be the solution.
        root = statistics.root()
        white = statistics.best_kernel() @ root
        groups = group_outputs(white, HEADS, RANK, generator)
        start = truncate(white, groups, RANK)
        inner = torch.linalg.solve_triangular(root, start.inner, upper=False, left=False)
        factors = alternate(Factors(groups, start.outer, inner), statistics)
    error = ((factors.kernel() - kernel).norm() / kernel.norm()).item()
    outer = factors.outer / weight[groups]
    install(block.conv2, Factors(groups, outer, factors.inner), generator)
    reorder(block, groups.flatten())
    return {'kernel': kernel, 'groups': groups, 'kernel error': error}


def install(operator: nn.Module, factors: Factors, generator: torch.Generator) -> None:
    """Give an ACmix operator the convolution path of these factors, and a small attention path."""
    factors = factors.balanced()
    positions, heads, _, rank = factors.outer.shape
    # Of the 3 N maps of a position, fc keeps the inner maps; what it drops is zero.
    fc, _ = torch.linalg.qr(torch.randn(3 * heads, rank, dtype=torch.float64, generator=generator))
    maps = (fc @ factors.inner).unflatten(1, (3, heads))
    side = operator.kernel_size
    new = {
        'fc.weight': fc.T[..., None, None],
        'dep_conv.weight': factors.outer.transpose(2, 3).flatten(0, 1).unflatten(2, side),
        'rate1': torch.tensor([ATTENTION_RATE]),
        'rate2': torch.ones(1),
    }
    for part in range(3):
        name = f'conv{part + 1}'
        new[f'{name}.weight'] = maps[:, part].transpose(0, 1).flatten(0, 1)[..., None, None]
        new[f'{name}.bias'] = torch.zeros(positions * heads)
    operator.load_state_dict({**operator.state_dict(), **new})


def reorder(block: nn.Module, order: Tensor) -> None:
    """Have a block work with the outputs of its 3x3 operator in this order."""
    for tensor in block.norm2.state_dict().values():
        if tensor.ndim:
            tensor.copy_(tensor[order])
    block.conv3.weight.copy_(block.conv3.weight[:, order])


def run(module: nn.Module, x: Tensor) -> Tensor:
    """A module's output, computed in batches."""
    return torch.cat([module(batch) for batch in x.split(BATCH)])


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Norm of the deviation, relative to the norm of what is expected."""
    return ((out - expected).norm() / expected.norm()).item()


def adapt(norm: nn.Module, expected: Tensor, actual: Tensor, fitted: int) -> list[Tensor]:
    """Change a norm's statistics, in place, as much as its input has changed.

    Mean and variance of its output become the plain network's. So a norm stays as it is where its
    input does, whatever the images are.

    Args:
        norm (nn.Module): With the plain network's statistics.
        expected (Tensor): Its input in the plain network.
        actual (Tensor): Its input in the mixed one.
        fitted (int): Number of images to take statistics of.

    Returns:
        list[Tensor]: Its output in the plain network and in the mixed one.
    """
    reference = norm(expected)
    means, variances = zip(
        *((x.mean((0, 2, 3)), x.var((0, 2, 3))) for x in (expected[:fitted], actual[:fitted])),
        strict=True,
    )
    ratio = (variances[1] + norm.eps) / (variances[0] + norm.eps)
    norm.running_mean.sub_(means[0]).mul_(ratio.sqrt()).add_(means[1])
    norm.running_var.add_(norm.eps).mul_(ratio).sub_(norm.eps).clamp_(min=0)
    return [reference, norm(actual)]


def convert(
    plain: nn.Module,
    mixed: nn.Module,
    images: Tensor | None,
    fitted: int,
    generator: torch.Generator | None = None,
) -> list[dict]:
    """Fit the mixed network to the plain one, in place, layer after layer.

    Every layer gets the inputs that those before it leave, and the plain network's outputs to
    reach, so that it corrects what it can of the errors before it.

    Args:
        plain (nn.Module): The plain network.
        mixed (nn.Module): ResNet-ACmix with the other weights of the plain one.
        images (Tensor | None): Shape (B, 3, H, W). None: kernels are fitted as they are, and norms
            keep their statistics.
        fitted (int): Number of images to fit to. The others measure errors.
        generator (torch.Generator | None): For what is drawn at random. None: operators stay as
            they are, and only norms get new statistics. Default: None.

    Returns:
        list[dict]: A row of results for every layer.
    """
    rows = []
    if images is not None:
        stem = nn.Sequential(plain.conv1, plain.norm1, plain.relu, plain.maxpool)
        expected = actual = run(stem, images)
    pairs = list(zip(bottlenecks(plain), bottlenecks(mixed), strict=True))
    description = 'measure the shift-initialised start' if generator is None else 'fit'
    for (name, theirs), (_, block) in tqdm(pairs, desc=description, unit='layer'):
        row = {'layer': name}
        rows.append(row)
        # Shortest names for maps: a of the plain network, b of the mixed one.
        statistics = a = b = None
        if images is not None:
            a, b = adapt(block.norm1, run(block.conv1, expected), run(block.conv1, actual), fitted)
            a, b = run(theirs.conv2, a.relu_()), b.relu_()
            if generator is not None:
                statistics = measure(theirs.conv2, b[:fitted], a[:fitted])
        if generator is not None:
            row |= fit(theirs, block, statistics, generator)
        if images is None:
            continue
        order = row['groups'].flatten() if 'groups' in row else slice(None)
        a, b = adapt(block.norm2, a[:, order], run(block.conv2, b), fitted)
        a, b = a.relu_(), b.relu_()
        row['output error'] = relative_error(b[fitted:], a[fitted:])
        a, b = adapt(block.norm3, run(block.conv3, a), run(block.conv3, b), fitted)
        if block.downsample is not None:
            conv, norm = block.downsample
            expected, actual = adapt(norm, run(conv, expected), run(conv, actual), fitted)
        expected, actual = (a + expected).relu_(), (b + actual).relu_()
        if block is getattr(mixed, name.split('.')[0])[-1]:
            row['features error'] = relative_error(actual[fitted:], expected[fitted:])
    return rows


def report(rows: list[dict], start: list[dict] | None) -> list[str]:
    """Lines of a table with the errors of every layer, and with images of every stage's features.

    Args:
        rows (list[dict]): Of :func:`convert`.
        start (list[dict] | None): The same of the shift-initialised network, if there are images.
    """
    lines = [
        'Relative errors. Energy: share of the kernel beyond rank 9, in groups of 4 channels.',
        f'{"layer":10}{"channels":>9}{"in order":>10}{"grouped":>9}{"kernel":>8}'
        + (f'{"output":>8}{"shift start":>13}' if start else ''),
    ]
    for index, row in enumerate(rows):
        ordered = torch.arange(len(row['kernel'])).view_as(row['groups'])
        energies = (energy_beyond(row['kernel'], g, RANK) for g in (ordered, row['groups']))
        line = f'{row["layer"]:10}{len(row["kernel"]):>9}'
        line += '{:>10.3f}{:>9.3f}'.format(*energies) + f'{row["kernel error"]:>8.3f}'
        if start:
            line += f'{row["output error"]:>8.3f}{start[index]["output error"]:>13.3f}'
        lines.append(line)
    if start:
        lines += ['', 'Relative errors of features on images held out']
        lines.append(f'{"stage":10}{"converted":>10}{"shift start":>13}{"ratio":>8}')
        for row, other in zip(rows, start, strict=True):
            if 'features error' in row:
                ours, theirs = row['features error'], other['features error']
                stage = row['layer'].split('.')[0]
                lines.append(f'{stage:10}{ours:>10.3f}{theirs:>13.3f}{ours / theirs:>8.2f}')
    return lines


def plot(rows: list[dict], file: Path) -> None:
    """Energy that a rank leaves out of the groups' kernels, for every layer."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.add_subplot()
    colours = matplotlib.colormaps['viridis'].resampled(len(rows))
    for index, row in enumerate(rows):
        energies = (spectra(row['kernel'], row['groups']) ** 2).sum(0)
        beyond = 1 - energies.cumsum(0) / energies.sum()
        ranks = range(1, len(energies))  # at full rank there is nothing left
        axes.semilogy(ranks, beyond[:-1], color=colours(index), label=row['layer'])
    axes.axvline(RANK, color='black', linewidth=0.8)
    axes.set_xlabel('rank of the kernels of 4 channels (ACmix: 9)')
    axes.set_ylabel('share of the energy beyond it')
    axes.set_ylim(bottom=1e-4)
    axes.legend(fontsize=7, ncols=2)
    write_figure(file, figure, dpi=150)


@torch.no_grad()
@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    weights, others = split_weights(state_dict_of(checkpoint), args.checkpoint)
    plain, mixed = build_networks(weights, args.checkpoint)
    images = start = None
    fitted = 0
    if args.images is not None:
        images = load_images(args)
        fitted = len(images) - max(1, len(images) // HELD_OUT)
        start = convert(plain, copy.deepcopy(mixed), images, fitted)
    generator = torch.Generator().manual_seed(args.seed)
    rows = convert(plain, mixed, images, fitted, generator)
    state = {f'backbone.{name}': value for name, value in mixed.state_dict().items()}
    meta = checkpoint.get('meta') or {}
    meta = {'dataset_meta': meta['dataset_meta']} if 'dataset_meta' in meta else {}
    write_checkpoint(args.out, {'state_dict': {**state, **others}, 'meta': meta})
    print(*report(rows, start), sep='\n')
    if args.plot is not None:
        plot(rows, args.plot)
        print(f'plot:       {args.plot}')
    print(f'checkpoint: {args.out} (ACmixResNet, depth={mixed.depth}, ', end='')
    print(f'base_channels={mixed.base_channels})')


if __name__ == '__main__':
    main()
