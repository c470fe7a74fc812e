"""Parameters and FLOPs of a config's model: detectors, segmentors and classifiers.

A multiplication with its addition is one FLOP. Convolutions, matrix products, attention and
aggregation are counted; norms, activations, pooling and interpolation are not. Counted is what the
model computes for one image in inference, with as many region proposals as the config lets through
(fewer on small images, where there are not as many) and 100 masks. Weights are the initial ones.
"""

import argparse
import sys
from functools import partial

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from acmix_mm.analysis.flops import count_flops
from acmix_mm.analysis.networks import without_checkpoints
from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    load_config,
    program,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar=('H', 'W'),
        help="image's height and width, one number for a square (default: the size to which the "
        "config's test pipeline resizes or crops)",
    )
    args = parser.parse_args(argv)
    if args.shape is not None and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape must be one or two positive integers, got {args.shape}')
    return args


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the test pipeline ends with; exits with a message if it names none."""
    dataset = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:  # wrappers
        dataset = dataset['dataset']
    size = None
    for transform in dataset.get('pipeline', []):
        if transform['type'] == 'Resize' and 'scale' in transform:
            scale = transform['scale']
            size = (scale, scale) if isinstance(scale, int) else tuple(scale)[::-1]
        elif transform['type'] == 'CenterCrop':
            crop = transform['crop_size']
            size = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if size is None:
        sys.exit('error: the test pipeline names no size of images; give one by --shape H W')
    return size


def build_model(cfg: Config) -> nn.Module:
    """The config's model with initial weights, in evaluation mode."""
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(ConfigDict(without_checkpoints(cfg.model.to_dict())))
    MMLogger.get_current_instance().setLevel('ERROR')  # init_weights logs every parameter
    model.init_weights()
    return revert_sync_batchnorm(model).eval()


def limit_masks(roi_head: nn.Module) -> None:
    """Have a cascade's mask heads see 100 regions, as the one of mmdet's Mask R-CNN does."""
    forward = roi_head._mask_forward

    def limited(stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor]:
        results = forward(stage, x, rois[:100])
        # What follows splits as many by image.
        results['mask_preds'] = results['mask_preds'][:1, :1].expand(len(rois), -1, -1, -1)
        return results

    roi_head._mask_forward = limited


def prepare(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """A random image as the model's preprocessor makes it; ``forward`` is set to take it alone."""
    data = {'inputs': [torch.randint(0, 256, (3, *size), dtype=torch.uint8)]}
    if hasattr(model, 'bbox_head') or hasattr(model, 'roi_head'):
        from mmdet.structures import DetDataSample

        meta = {'img_shape': size, 'ori_shape': size, 'scale_factor': (1.0, 1.0)}
        data['data_samples'] = [DetDataSample(metainfo=meta)]
        if hasattr(model, 'roi_head') and hasattr(model.roi_head, 'num_stages'):
            limit_masks(model.roi_head)
    data = model.data_preprocessor(data)
    model.forward = partial(model.forward, data_samples=data.get('data_samples'), mode='tensor')
    return data['inputs']


def readable(count: int) -> str:
    """Millions or billions."""
    return f'{count / 1e9:.2f} G' if count >= 1e9 else f'{count / 1e6:.2f} M'


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    size = image_size(cfg) if args.shape is None else (args.shape[0], args.shape[-1])
    model = build_model(cfg)
    inputs = prepare(model, size)
    with torch.no_grad():
        flops = count_flops(lambda: model(inputs))
    parts = (model, model.backbone)
    total, backbone = (readable(sum(p.numel() for p in m.parameters())) for m in parts)
    padded = tuple(inputs.shape[-2:])
    padding = '' if padded == size else f', padded to {padded[0]} x {padded[1]}'
    print(f'image:      {size[0]} x {size[1]}{padding}')
    print(f'parameters: {total}, {backbone} of them in the backbone')
    print(f'FLOPs:      {readable(flops)} (a multiplication with its addition is one)')


if __name__ == '__main__':
    main()
