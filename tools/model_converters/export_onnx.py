"""Export a trained backbone, folded for inference, to ONNX.

The graph takes a normalised image `image`, 1x3xHxW with H and W of 65 or more, and gives the
backbone's maps `stage1`, `stage2`, ... . It is checked against PyTorch in ONNX Runtime at two
sizes before the program ends. Needs the packages of the extra `onnx`.
"""

import argparse
import sys
from pathlib import Path

import torch

from acmix_mm.command_line import (
    add_config_arguments,
    build_model,
    load_checkpoint,
    load_config,
    relative_error,
)
from acmix_mm.ops.export import decompositions

TRACE_SIZE = (97, 130)
CHECK_SIZES = ((97, 130), (128, 224))
MIN_SIZE = 65  # the deepest map then has 3 pixels or more along both axes
TOLERANCE = 1e-3  # of an output's largest value; float32 sums in another order


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint that fits the config, deployed or not')
    parser.add_argument('out', type=Path, metavar='OUT.onnx', help='file to write; must not exist')
    return parser.parse_args(argv)


def export(backbone: torch.nn.Module, out: Path) -> list[str]:
    """Write the backbone as an ONNX file with dynamic height and width; returns output names."""
    image = torch.randn(1, 3, *TRACE_SIZE)
    size = {dim: torch.export.Dim(name, min=MIN_SIZE) for dim, name in ((2, 'H'), (3, 'W'))}
    program = torch.export.export(backbone, (image,), dynamic_shapes=(size,))
    table = {**torch.export.default_decompositions(), **decompositions()}
    program = program.run_decompositions(table)
    names = [f'stage{i + 1}' for i in backbone.out_indices]
    torch.onnx.export(
        program, (), str(out), input_names=['image'], output_names=names, external_data=False,
        verbose=False,
    )  # fmt: skip
    return names


def check(backbone: torch.nn.Module, file: Path, size: tuple[int, int]) -> float:
    """Largest deviation of ONNX Runtime's outputs, relative to each output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    image = torch.randn(1, 3, *size)
    outputs = session.run(None, {'image': image.numpy()})
    return relative_error(map(torch.from_numpy, outputs), backbone(image))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.out.suffix != '.onnx':
        sys.exit(f'error: OUT must end in .onnx, got {args.out}')
    if not args.out.parent.is_dir():
        sys.exit(f'error: folder {args.out.parent} does not exist')
    if args.out.exists():
        sys.exit(f'error: {args.out} exists already')
    cfg = load_config(args.config, args.cfg_options)
    cfg.model.backbone.backend = 'torch'  # the one whose operators have decompositions
    torch.manual_seed(0)
    backbone = build_model(cfg, load_checkpoint(args.checkpoint), args).backbone
    if hasattr(backbone, 'switch_to_deploy'):
        backbone.switch_to_deploy()
    print('exporting, some minutes for a deep backbone', flush=True)
    names = export(backbone, args.out)
    for size in CHECK_SIZES:
        error = check(backbone, args.out, size)
        print(f'largest deviation of ONNX Runtime at {size[0]}x{size[1]}, relative: {error:.1e}')
        if not error <= TOLERANCE:
            sys.exit(f'error: {args.out} does not give the results of PyTorch')
    print(f'outputs:    {", ".join(names)}')
    print(f'ONNX model: {args.out}')


if __name__ == '__main__':
    main()
