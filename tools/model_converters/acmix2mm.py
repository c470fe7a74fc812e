"""Convert checkpoints of the ACmix authors' release to this project's form, or back.

Kinds, recognised by their names: Swin-ACmix, of which the release has T and S, and ResNet-ACmix,
as its training program writes it. IN holds the weights as they are, or under `state_dict` or
`model`, with or without `module.`; it is read with torch's safe loader.

OUT has mmpretrain's form, for init_cfg=dict(type='Pretrained', checkpoint=OUT, prefix='backbone.'):
{'state_dict': {'backbone.NAME': ..., 'head.fc.NAME': ...}, 'meta': ...}. With --reverse it is what
the release's programs load: {'model': ...} for Swin, {'state_dict': {'module.NAME': ...}} for
ResNet; what is not in IN because it follows from the architecture is made again, masks of shifted
windows for the input size of the release, 224 for windows of 7 pixels.

Both ways every name and shape must be that of the network that the weights are for.
"""

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import torch
from mmdet.models.backbones.swin import swin_converter
from torch import Tensor, nn

from acmix_mm.backbones import ACmixResNet, ACmixSwinTransformer
from acmix_mm.backbones.acmix_swin import shift_mask
from acmix_mm.checkpoints import state_dict_of
from acmix_mm.command_line import (
    Parser,
    check_out,
    load_checkpoint,
    program,
)
from acmix_mm.files import write_checkpoint

Weights = dict[str, Tensor]


class Swin:
    """Names of the release's folder Swin-Transformer: `layers`, `mlp`, `norm`, `head`."""

    title = 'Swin-ACmix'
    mark = 'layers.0.blocks.0.attn.rate1'
    own_mark = 'backbone.stages.0.blocks.0.attn.w_msa.rate1'
    dropped: ClassVar = {'attn_mask': 'computed for every size of image'}
    # Names of a block and of the patch embedding, the release's and ours.
    renamed: ClassVar = (
        ('layers.', 'stages.'),
        ('.attn.', '.attn.w_msa.'),
        ('.mlp.fc1.', '.ffn.layers.0.0.'),
        ('.mlp.fc2.', '.ffn.layers.1.'),
        ('patch_embed.proj.', 'patch_embed.projection.'),
    )

    @staticmethod
    def to_own(weights: Weights) -> Weights:
        own = swin_converter(weights)
        last = 1 + max(int(n.split('.')[1]) for n in weights if n.startswith('layers.'))
        for kind in ('weight', 'bias'):
            rename(own, f'backbone.norm.{kind}', f'backbone.norm{last - 1}.{kind}')
            if f'head.{kind}' in weights:
                own[f'head.fc.{kind}'] = weights[f'head.{kind}']
        return own

    @classmethod
    def to_release(cls, weights: Weights, model: ACmixSwinTransformer) -> Weights:
        release = {}
        for own_name, weight in weights.items():
            name = own_name.removeprefix('backbone.').replace('head.fc.', 'head.')
            for theirs, ours in cls.renamed:
                name = name.replace(ours, theirs)
            name = re.sub(r'^norm\d\.', 'norm.', name)
            if '.downsample.' in name:
                weight = order_of_release(weight)
            release[name] = weight
        window = model.stages[0].blocks[0].attn.window_size
        for i, stage in enumerate(model.stages):
            side = window * 2 ** (len(model.stages) - 1 - i)
            for j, block in enumerate(stage.blocks):
                shift = block.attn.shift_size
                if shift and side > window:
                    mask = shift_mask(side, side, window, shift, torch.empty(0))
                    release[f'layers.{i}.blocks.{j}.attn_mask'] = mask.clamp(min=-100)
        return release

    @staticmethod
    def build(weights: Weights) -> ACmixSwinTransformer:
        """The network of these weights, of our names without `backbone.`."""
        depths = counts(weights, r'stages\.(\d+)\.blocks\.(\d+)\.')
        block = 'stages.{}.blocks.0.attn.w_msa.{}'
        tables = [
            weights[block.format(i, 'relative_position_bias_table')] for i in range(len(depths))
        ]
        patches = weights['patch_embed.projection.weight']
        return ACmixSwinTransformer(
            in_channels=patches.shape[1],
            embed_dims=patches.shape[0],
            patch_size=patches.shape[2],
            strides=(patches.shape[2], *(2,) * (len(depths) - 1)),
            depths=depths,
            num_heads=[table.shape[1] for table in tables],
            window_size=(math.isqrt(tables[0].shape[0]) + 1) // 2,
            mlp_ratio=weights['stages.0.blocks.0.ffn.layers.0.0.weight'].shape[0]
            // patches.shape[0],
            qkv_bias=block.format(0, 'qkv.bias') in weights,
            patch_norm='patch_embed.norm.weight' in weights,
            conv_kernel_size=math.isqrt(weights[block.format(0, 'fc.weight')].shape[0]),
            out_indices=(len(depths) - 1,),
        )

    @staticmethod
    def describe(model: ACmixSwinTransformer) -> str:
        blocks = [len(stage.blocks) for stage in model.stages]
        heads = [stage.blocks[0].attn.w_msa.num_heads for stage in model.stages]
        return f'embed_dims={model.num_features[0]}, depths={blocks}, num_heads={heads}'


class ResNet:
    """Names of the release's folder ResNet, which are torchvision's and ours."""

    title = 'ResNet-ACmix'
    mark = 'layer1.0.conv2.rate1'
    own_mark = f'backbone.{mark}'
    dropped: ClassVar = {'conv_p.bias': 'has no effect on any output'}

    @staticmethod
    def to_own(weights: Weights) -> Weights:
        return {
            f'head.{name}' if name.startswith('fc.') else f'backbone.{name}': weight
            for name, weight in weights.items()
        }

    @staticmethod
    def to_release(weights: Weights, model: ACmixResNet) -> Weights:
        release = {n.removeprefix('backbone.').removeprefix('head.'): w for n, w in weights.items()}
        for name in [name for name in release if name.endswith('.conv_p.weight')]:
            bias = release[name].new_zeros(release[name].shape[0])
            release[name.replace('weight', 'bias')] = bias
        return release

    @staticmethod
    def build(weights: Weights) -> ACmixResNet:
        """The network of these weights, of our names without `backbone.`."""
        blocks = counts(weights, r'layer(\d+)\.(\d+)\.', first=1)
        depths = {kinds[1]: depth for depth, kinds in ACmixResNet.arch_settings.items()}
        if blocks not in depths:
            known = ' or '.join(map(str, depths))
            raise ValueError(f'its stages must have {known} blocks, got {blocks}')
        fc = weights['layer1.0.conv2.fc.weight']
        return ACmixResNet(
            depths[blocks],
            in_channels=weights['conv1.weight'].shape[1],
            base_channels=weights['conv1.weight'].shape[0],
            num_heads=fc.shape[1] // 3,
            conv_kernel_size=math.isqrt(fc.shape[0]),
        )

    @staticmethod
    def describe(model: ACmixResNet) -> str:
        return f'depth={model.depth}, base_channels={model.base_channels}'


KINDS = (Swin, ResNet)


def rename(weights: Weights, name: str, new: str) -> None:
    if name in weights:
        weights[new] = weights.pop(name)


def counts(weights: Weights, pattern: str, first: int = 0) -> tuple[int, ...]:
    """Blocks of every stage, from names that match a pattern with the numbers of both."""
    found = {tuple(map(int, m.groups())) for m in map(re.compile(pattern).match, weights) if m}
    stages = max((stage for stage, _ in found), default=first - 1) + 1
    return tuple(
        max((block for s, block in found if s == stage), default=-1) + 1
        for stage in range(first, stages)
    )


def order_of_release(weight: Tensor) -> Tensor:
    """Columns of patch merging as the release has them: the inverse of mmdet's swin_converter.

    The release concatenates the four neighbours, downwards first; mmdet unfolds, so that a
    channel's four, across first, are together.
    """
    neighbours = weight.unflatten(-1, (-1, 4)).transpose(-1, -2)
    return neighbours[..., [0, 2, 1, 3], :].flatten(-2)


def check_names(weights: Weights, model: nn.Module, file: Path) -> None:
    """Exits with a message unless all names and shapes are the model's and a classifier's."""
    shapes = {f'backbone.{name}': value.shape for name, value in model.state_dict().items()}
    for kind in ('weight', 'bias'):  # of any number of classes, or left out
        if f'head.fc.{kind}' in weights:
            shapes[f'head.fc.{kind}'] = weights[f'head.fc.{kind}'].shape
    problems = []
    for what, names in (
        ('missing', [n for n in shapes if n not in weights]),
        ('not known', [n for n in weights if n not in shapes]),
        ('of another shape', [n for n in weights if n in shapes and weights[n].shape != shapes[n]]),
    ):
        if names:
            problems.append(f'{len(names)} {what} ({shortened(names)})')
    if problems:
        sys.exit(
            f'error: {file} is not a whole {type(model).__name__}; under names of this project: '
            f'{", ".join(problems)}'
        )


def shortened(names: Iterable[str]) -> str:
    names = list(names)
    return ', '.join([*names[:3], '...'] if len(names) > 3 else names)


def to_own(kind: type, weights: Weights, file: Path) -> tuple[Weights, nn.Module]:
    """Weights of the release in our names, and the model that they are for."""
    for end, why in kind.dropped.items():
        names = [name for name in weights if name.endswith(f'.{end}')]
        if names:
            print(f'dropped:     {len(names)} {end}: {why}')
    dropped = tuple(f'.{end}' for end in kind.dropped)
    own = kind.to_own({n: w for n, w in weights.items() if not n.endswith(dropped)})
    model = build(kind, own, file)
    for name, value in model.named_buffers():
        # Follows from the window, so that it may be left out, but not be another.
        if name.endswith('relative_position_index') and not torch.equal(
            own.setdefault(f'backbone.{name}', value), value
        ):
            sys.exit(f'error: {file}: backbone.{name} is not that of its window')
    check_names(own, model, file)
    return own, model


def build(kind: type, weights: Weights, file: Path) -> nn.Module:
    """The model that weights of our names are for."""
    prefix = 'backbone.'
    try:
        return kind.build({n.removeprefix(prefix): w for n, w in weights.items()})
    except KeyError as error:
        sys.exit(f'error: {file} is not a whole {kind.title}: {prefix}{error.args[0]} is missing')
    except (ValueError, IndexError) as error:
        sys.exit(f'error: {file} is no {kind.title}: {error}')


def recognise(weights: Weights, reverse: bool, file: Path) -> type:
    for kind in KINDS:
        if (kind.own_mark if reverse else kind.mark) in weights:
            return kind
    form = "this project's" if reverse else "the release's"
    marks = ' or '.join(kind.own_mark if reverse else kind.mark for kind in KINDS)
    other = [k.title for k in KINDS if (k.mark if reverse else k.own_mark) in weights]
    hint = f'; it is a {other[0]} of the other form' if other else ''
    sys.exit(f'error: {file} is of no known kind in {form} form, with {marks}{hint}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', metavar='IN', type=Path, help='checkpoint')
    parser.add_argument('out', metavar='OUT.pth', type=Path, help='file to write; must not exist')
    parser.add_argument('--reverse', action='store_true', help="to the release's form")
    return parser.parse_args(argv)


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args.out, '.pth')
    weights = state_dict_of(load_checkpoint(str(args.file)))
    kind = recognise(weights, args.reverse, args.file)
    if args.reverse:
        model = build(kind, weights, args.file)
        check_names(weights, model, args.file)
        release = kind.to_release(weights, model)
        for end in kind.dropped:
            print(f'made again:  {sum(n.endswith(f".{end}") for n in release)} {end}')
        if kind is ResNet:
            state = {'state_dict': {f'module.{name}': weight for name, weight in release.items()}}
        else:
            state = {'model': release}
    else:
        own, model = to_own(kind, weights, args.file)
        state = {'meta': {'source': args.file.name}, 'state_dict': own}
    write_checkpoint(args.out, state)
    head = weights.get('head.fc.weight', weights.get('head.weight', weights.get('fc.weight')))
    print(f'model:       {type(model).__name__}({kind.describe(model)})')
    print(f'classifier:  {"none" if head is None else f"{head.shape[0]} classes"}')
    print(f'checkpoint:  {args.out}')


if __name__ == '__main__':
    main()
