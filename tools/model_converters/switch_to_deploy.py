"""Fold the operators of a trained model for inference (see acmix_mm.deploy).

In backbones of this package and wherever `dcn` or `conv_cfg` put them. Writes OUT.pth, weights and
meta data without optimiser state, and beside it the config that goes with it, OUT.py, for
tools/test.py, tools/predict.py and this folder's export_onnx.py.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from acmix_mm import deploy
from acmix_mm.analysis.costs import prediction
from acmix_mm.analysis.networks import without_checkpoints
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
from acmix_mm.config_check import arguments_of, class_of, settings_of
from acmix_mm.files import whole_file, write_checkpoint
from acmix_mm.layers.deployable import Deployable
from acmix_mm.weights import build, misfit

SIZE = (97, 130)  # of the random image by which the folded model is checked
TOLERANCE = 1e-3  # of an output's largest value; float32 sums in another order


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint of a training with that config')
    parser.add_argument('out', type=Path, metavar='OUT.pth', help='file to write; must not exist')
    return parser.parse_args(argv)


def foldable(module: nn.Module) -> bool:
    """Whether acmix_mm.deploy changes anything of a module."""
    return any(
        isinstance(m, Deployable) or hasattr(m, 'fuse_convolutions') for m in module.modules()
    )


def calls(model: nn.Module) -> dict[str, tuple[tuple, dict, list[Tensor]]]:
    """Arguments and results of the outermost foldable parts that a prediction calls, by name.

    Of each the last call. Parts are looked at one by one because what happens between them may
    leap: a region proposal comes or goes by rounding.
    """
    found = {}

    def note(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            # Copies, as what follows may work in place.
            args, kwargs, out = tree_map_only(Tensor, Tensor.clone, (args, kwargs, out))
            found[name] = (args, kwargs, tree_leaves(out))

        return hook

    parts = {name: part for name, part in model.named_modules() if name and foldable(part)}
    hooks = [
        part.register_forward_hook(note(name), with_kwargs=True) for name, part in parts.items()
    ]
    predict, image = prediction(model, SIZE)
    if all(name.split('.')[0] == 'backbone' for name in parts):
        model.backbone(image)
    else:
        predict(image)
    for hook in hooks:
        hook.remove()
    return {
        name: call
        for name, call in found.items()
        if not any(name.startswith(f'{outer}.') for outer in found)
    }


def deviation(model: nn.Module, before: dict[str, tuple[tuple, dict, list[Tensor]]]) -> float:
    """Largest relative one of the parts from what they gave before."""
    return max(
        relative_error(tree_leaves(model.get_submodule(name)(*args, **kwargs)), expected)
        for name, (args, kwargs, expected) in before.items()
    )


def deployables(cfg: Config) -> Iterator[dict]:
    """The parts of a model's config that take ``deploy``: of backbones and of layers."""
    for _, node in [('model', cfg.model), *settings_of(cfg.model, 'model')]:
        if isinstance(node, dict) and 'type' in node:
            kind = class_of(node['type'], (MODELS,), node.get('_scope_'))
            if kind is not None and 'deploy' in arguments_of(kind)[0]:
                yield node


@torch.no_grad()
@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    config_out = args.out.with_suffix('.py')
    check_out(args.out, '.pth')
    check_out(config_out, '.py')
    cfg = load_config(args.config, args.cfg_options)
    checkpoint = load_checkpoint(args.checkpoint)
    keep_freed_memory()
    if any(node.get('deploy') for node in deployables(cfg)):
        sys.exit(f'error: the model of {args.config} is deployed already')
    model = build_model(cfg, checkpoint, args)
    if not foldable(model):
        sys.exit(f'error: the model of {args.config} has nothing that could be folded')

    torch.manual_seed(0)
    before = calls(model)
    modules = len(list(model.modules()))
    deploy(model)
    error = deviation(model, before)
    if not error <= TOLERANCE:
        sys.exit(f'error: the folded model deviates by {error:.1e}, relative; nothing written')

    cfg.model = ConfigDict(without_checkpoints(cfg.model.to_dict()))
    for node in deployables(cfg):
        node.deploy = True
    state = {'meta': checkpoint.get('meta', {}), 'state_dict': model.state_dict()}
    problem = misfit(build(cfg), state)
    if problem:
        sys.exit(
            f'error: no config builds the folded model of {args.config}, whose operators are not '
            f'all of a type that takes deploy=True: {problem}; nothing written'
        )
    with whole_file(config_out) as part:  # none of the two without the other
        cfg.dump(part)
        write_checkpoint(args.out, state)
    print(f'modules: {len(list(model.modules()))}, before {modules}')
    print(f'largest deviation of an output of {", ".join(before)}, relative: {error:.1e}')
    print(f'checkpoint: {args.out}')
    print(f'config:     {config_out}')


if __name__ == '__main__':
    main()
