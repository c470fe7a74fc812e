"""Export a trained backbone, folded for inference, to ONNX.

The graph takes a normalised image `image`, 1x3xHxW with H and W of 65 or more, for Swin's pyramids
(Swin-ACmix, DWNet) multiples of 32, and gives the backbone's maps `stage1`, `stage2`, ... . It is
checked against PyTorch in ONNX Runtime at two sizes before the program ends. With --size, it takes
images of one size. Needs the packages of the extra `onnx`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmdet.models.backbones import SwinTransformer

from acmix_mm import export_onnx
from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    build_model,
    check_out,
    load_checkpoint,
    load_config,
    program,
    relative_error,
)
from acmix_mm.files import whole_file

TRACE_SIZE = (417, 482)  # the deepest maps have several windows of Swin along both axes
CHECK_SIZES = ((97, 130), (257, 290))
MIN_SIZE = 65  # the deepest map then has 3 pixels or more along both axes
STRIDE = 32  # of the deepest map
TOLERANCE = 1e-3  # of an output's largest value; float32 sums in another order


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint that fits the config, deployed or not')
    parser.add_argument('out', type=Path, metavar='OUT.onnx', help='file to write; must not exist')
    parser.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'),
        help='export for images of this size alone, in pixels; quicker (default: for any size)',
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.size and min(args.size) < 1:
        parser.error(f'argument --size: must be 1 or more, got {args.size[0]} {args.size[1]}')
    return args


def divisor_of(backbone: torch.nn.Module) -> int:
    """What divides the sides of images that a graph for any size takes."""
    return STRIDE if isinstance(backbone, SwinTransformer) else 1  # mmdet pads by integers


def rounded(size: Sequence[int], divisor: int) -> list[int]:
    return [-(-side // divisor) * divisor for side in size]


def export(backbone: torch.nn.Module, size: list[int] | None, out: Path) -> list[str]:
    """Write the backbone as an ONNX file, for one size or for all; returns output names."""
    divisor = divisor_of(backbone)
    image = torch.randn(1, 3, *(size or rounded(TRACE_SIZE, divisor)))
    any_size = {}
    for dim, name in ((2, 'H'), (3, 'W')):
        parts = torch.export.Dim(name, min=-(-MIN_SIZE // divisor))
        any_size[dim] = divisor * parts if divisor > 1 else parts
    names = [f'stage{i + 1}' for i in backbone.out_indices]
    export_onnx(
        backbone,
        (image,),
        out,
        dynamic_shapes=None if size else (any_size,),
        input_names=['image'],
        output_names=names,
    )
    return names


def check(backbone: torch.nn.Module, file: Path, size: Sequence[int]) -> float:
    """Largest deviation of ONNX Runtime's outputs, relative to each output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    image = torch.randn(1, 3, *size)
    outputs = session.run(None, {'image': image.numpy()})
    return relative_error(map(torch.from_numpy, outputs), backbone(image))


@torch.no_grad()
@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args.out, '.onnx')
    cfg = load_config(args.config, args.cfg_options)
    torch.manual_seed(0)
    backbone = build_model(cfg, load_checkpoint(args.checkpoint), args).backbone
    print('exporting, some minutes for a deep backbone', flush=True)
    with whole_file(args.out) as part:
        names = export(backbone, args.size, part)
        sizes = [rounded(size, divisor_of(backbone)) for size in CHECK_SIZES]
        for size in [args.size] if args.size else sizes:
            error = check(backbone, part, size)
            at = f'at {size[0]}x{size[1]}, relative'
            print(f'largest deviation of ONNX Runtime {at}: {error:.1e}')
            if not error <= TOLERANCE:
                sys.exit(
                    f'error: the exported graph does not give the results of PyTorch; {args.out} '
                    'is not written'
                )
    print(f'outputs:    {", ".join(names)}')
    print(f'ONNX model: {args.out}')


if __name__ == '__main__':
    main()
