"""Fold a trained checkpoint's backbone for inference (see acmix_mm.deploy).

Writes OUT.pth, weights and meta data without optimiser state, and beside it the config that goes
with it, OUT.py, for tools/test.py, tools/predict.py and this folder's export_onnx.py.
"""

import argparse
import sys
from pathlib import Path

import torch

from acmix_mm import deploy
from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    build_model,
    check_out,
    keep_freed_memory,
    load_checkpoint,
    load_config,
    program,
    relative_error,
)
from acmix_mm.files import whole_file, write_checkpoint

SIZE = (97, 130)  # of the random image by which the folded backbone is checked
TOLERANCE = 1e-3  # of an output's largest value; float32 sums in another order


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint of a training with that config')
    parser.add_argument('out', type=Path, metavar='OUT.pth', help='file to write; must not exist')
    return parser.parse_args(argv)


@torch.no_grad()
@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config_out = args.out.with_suffix('.py')
    check_out(args.out, '.pth')
    check_out(config_out, '.py')
    cfg = load_config(args.config, args.cfg_options)
    if cfg.model.backbone.get('deploy'):
        sys.exit(f'error: the backbone of {args.config} is deployed already')
    checkpoint = load_checkpoint(args.checkpoint)
    keep_freed_memory()
    model = build_model(cfg, checkpoint, args)
    if not hasattr(model.backbone, 'switch_to_deploy'):
        sys.exit(f'error: {type(model.backbone).__name__} has no form for deployment')

    image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    expected = model.backbone(image)
    modules = len(list(model.backbone.modules()))
    deploy(model.backbone)
    error = relative_error(model.backbone(image), expected)
    if not error <= TOLERANCE:
        sys.exit(f'error: the folded backbone deviates by {error:.1e}, relative; nothing written')

    cfg.model.backbone.update(deploy=True, init_cfg=None)
    cfg.model.backbone.pop('warm_start', None)  # of init_cfg
    state = {'meta': checkpoint.get('meta', {}), 'state_dict': model.state_dict()}
    with whole_file(config_out) as part:  # none of the two without the other
        cfg.dump(part)
        write_checkpoint(args.out, state)
    print(f'modules of the backbone: {len(list(model.backbone.modules()))}, before {modules}')
    print(f'largest deviation of an output, relative: {error:.1e}')
    print(f'checkpoint: {args.out}')
    print(f'config:     {config_out}')


if __name__ == '__main__':
    main()
