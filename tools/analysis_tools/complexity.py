"""Parameters and FLOPs of a config's model, and of its mixed operators by stage.

A multiplication with its addition is one FLOP. Convolutions, matrix products, attention and
aggregation are counted; norms, activations, pooling and interpolation are not. Counted is what a
detector, segmentor or classifier computes for one image in inference, with as many region proposals
as the config lets through (fewer on small images, where there are not as many) and 100 masks.
Weights are the initial ones.

The paper (ACmix, CVPR 2022, section 3 and Table 1) divides what an operator computes in Stage I,
the 1x1 projections, and Stage II, what is done with them: in the attention path logits and weighted
sums, in the convolution path shifts and sums. Beside every mixed operator stand a plain convolution
of its channels, stride and kernel, as the k^2 1x1 projections and the additions into which the
paper takes it apart, and self-attention alone. In the network's sums such additions do not count,
as in all other convolutions. FLOPs by stage are closed forms, written down in
acmix_mm/analysis/costs.py with what belongs to which stage; --by-layer has what PyTorch counts
beside them.

Stage I's share is given for the FLOPs of all operators together and as the mean of each operator's
share. With a stride, the projections are those of the map before it, and the paper's formulas have
one size for both stages: "both stages at the size of the output" is self-attention by these. For
ResNet-50 the paper prints 99 % for convolution and 83 % for self-attention. They arise as means
over the 16 3x3 convolutions with one size for both stages, 99.3 % and 83.2 %; of all FLOPs together
it is 99.3 % and 82.0 %.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

from acmix_mm.analysis.costs import NetworkCosts, network_costs
from acmix_mm.analysis.networks import image_size, initial_model
from acmix_mm.analysis.report import (
    operators_csv,
    plot_stages,
    readable,
    report_costs,
    report_operators,
)
from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    load_config,
    output_type,
    program,
)
from acmix_mm.files import write_whole
from acmix_mm.layers import MixedOperator

EXAMPLES = """
examples:
  complexity.py configs/imagenet/acmix-r50_8xb32-100e_in1k.py
  complexity.py configs/demo/retinanet_acmix-r26_fpn_scene-digits.py --shape 160 --by-layer
  complexity.py configs/acmix_swin/mask-rcnn_acmix-swin-t_fpn_8xb2-1x_coco.py --plot stages.png
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar=('H', 'W'),
        help="image's height and width, one number for a square (default: the size to which the "
        "config's test pipeline resizes or crops)",
    )
    parser.add_argument('--by-layer', action='store_true', help='a line for each mixed operator')
    for suffixes, what in (
        (('.png', '.svg', '.pdf'), 'FLOPs of each mixed operator by stage, as a picture'),
        (('.json',), 'all costs'),
        (('.csv',), 'a line for each mixed operator'),
    ):
        option = 'plot' if '.png' in suffixes else suffixes[0][1:]
        parser.add_argument(
            f'--{option}', type=partial(output_type, suffixes), metavar=f'FILE{suffixes[0]}',
            help=f'write {what}',
        )  # fmt: skip
    args = parser.parse_args(argv)
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape must be one or two positive integers, got {args.shape}')
    return args


def count(args: argparse.Namespace) -> tuple[tuple[int, int], NetworkCosts]:
    """The image's size and the costs, with a bar that moves with the model's modules."""
    cfg = load_config(args.config, args.cfg_options, ['model'])
    if args.shape is None:
        try:
            size = image_size(cfg)
        except ValueError as error:
            sys.exit(f'error: {error}; give one by --shape H W')
    else:
        size = (args.shape[0], args.shape[-1])
    model = initial_model(cfg)
    modules = list(model.modules())
    if args.plot is not None and not any(isinstance(m, MixedOperator) for m in modules):
        sys.exit(f'error: --plot {args.plot}: the model of {args.config} has no mixed operators')
    with tqdm(total=len(modules), desc='forward pass', unit='module', leave=False) as bar:
        hook = register_module_forward_hook(lambda *_: bar.update() and None)
        try:
            return size, network_costs(model, size)
        finally:
            hook.remove()


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    size, costs = count(args)
    padded = '' if costs.image == size else f', padded to {costs.image[0]} x {costs.image[1]}'
    print(f'image:      {size[0]} x {size[1]}{padded}')
    for name, key, note in (
        ('parameters', 'parameters', ''),
        ('FLOPs', 'flops', ' (a multiplication with its addition is one)'),
    ):
        part = ''
        if costs.backbone is not None:
            part = f', {readable(getattr(costs.backbone, key))} of them in the backbone'
        print(f'{name + ":":12}{readable(getattr(costs.whole, key))}{part}{note}')
    kinds = ', '.join(sorted({operator.kind for operator in costs.operators}))
    print(f'operators:  {f"{len(costs.operators)} mixed ({kinds})" if kinds else "none is mixed"}')
    if costs.operators:
        print('', *report_costs(costs), sep='\n')
        if 'ACmix' in kinds.split(', '):
            print("(the paper's Table 1, ResNet-50: convolution 99 %, self-attention 83 %)")
        if args.by_layer:
            print('', *report_operators(costs), sep='\n')
    print()
    if args.json is not None:
        content = {'config': args.config, 'options': args.cfg_options, **asdict(costs)}
        write_whole(args.json, json.dumps(content, indent=1))
        print(f'costs:      {args.json}')
    if args.csv is not None:
        write_whole(args.csv, operators_csv(costs))
        print(f'table:      {args.csv}')
    if args.plot is not None:
        plot_stages(costs, f'{Path(args.config).stem}, {size[0]} x {size[1]}', args.plot)
        print(f'plot:       {args.plot}')


if __name__ == '__main__':
    main()
