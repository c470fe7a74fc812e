"""Export a trained detector or segmentor, from picture to results, as one ONNX file.

The file holds the test pipeline's resizing and normalisation, the model, folded for inference, and
its post-processing. ONNX Runtime runs it on pictures of any size: input `picture`, uint8 (H, W, 3)
in RGB; outputs `boxes` (n, 4) in pixels of the picture, `scores` and `labels` (n,) of a detector,
`label_map` (H, W) of a segmentor. tools/predict.py and tools/test.py take it as well.

Detectors are one-stage ones with the post-processing of mmdet's BaseDenseHead (RetinaNet, FCOS,
ATSS, RTMDet), segmentors those of mmseg that see whole images (Semantic FPN, UperNet). Before the
program ends, the file's results are compared with PyTorch's on two pictures. Needs the packages of
the extra `onnx`.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement
from torch import nn

from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    build_model,
    check_out,
    load_checkpoint,
    load_config,
    program,
)
from acmix_mm.files import whole_file
from acmix_mm.onnx_graphs import pad_to_multiples
from acmix_mm.onnx_model import META_KEYS, ONNXModel, export_model

CHECK_SIZES = ((120, 170), (270, 390))  # one window of Swin in the deepest map, and several
LARGEST_DIFFERENCE = 0.01  # of scores, or of labels' share of the pixels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint that fits the config, deployed or not')
    parser.add_argument('out', type=Path, metavar='OUT.onnx', help='file to write; must not exist')
    return parser.parse_args(argv)


def picture_of(size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) of coloured spots, the same for each size."""
    spots = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(spots, size, mode='bicubic').clamp(0, 1)
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


def data_of(pipeline: list[dict], picture: np.ndarray) -> dict:
    """A batch of one picture after those transforms of a test pipeline that read no file."""
    data = {'img': picture, 'img_shape': picture.shape[:2], 'ori_shape': picture.shape[:2]}
    for transform in pipeline:
        if not transform['type'].startswith('Load'):
            if transform['type'].startswith('Pack'):
                transform = {**transform, 'meta_keys': (*META_KEYS, 'scale_factor')}
            data = TRANSFORMS.build(transform)(data)
    return pseudo_collate([data])


def difference(ours: BaseDataElement, theirs: BaseDataElement) -> float:
    """Largest difference of scores in their order, or the share of pixels with other labels."""
    if 'pred_sem_seg' in ours:
        return (ours.pred_sem_seg.data != theirs.pred_sem_seg.data).float().mean().item()
    a, b = (sample.pred_instances.scores for sample in (ours, theirs))
    length = max(len(a), len(b))
    a, b = (nn.functional.pad(scores, (0, length - len(scores))) for scores in (a, b))
    return (a - b).abs().max().item() if length else 0.0


def check(model: nn.Module, cfg: Config, file: Path) -> None:
    """Exits with a message unless a file gives the model's results."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # wrappers
        dataset = dataset.dataset
    loaded = ONNXModel(str(file))
    pack = [transform for transform in dataset.pipeline if transform.type.startswith('Pack')]
    for size in CHECK_SIZES:
        picture = picture_of(size)
        (theirs,) = model.test_step(data_of(dataset.pipeline, picture))
        (ours,) = loaded.test_step(data_of(pack, picture))
        what = 'labels' if 'pred_sem_seg' in ours else 'scores'
        found = difference(ours, theirs)
        print(f'difference from PyTorch on a picture of {size[0]}x{size[1]}, {what}: {found:.1e}')
        if not found <= LARGEST_DIFFERENCE:
            sys.exit('error: the file does not give the results of PyTorch; it is not written')


@torch.no_grad()
@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_out(args.out, '.onnx')
    cfg = load_config(args.config, args.cfg_options)
    checkpoint = load_checkpoint(args.checkpoint)
    if pad_to_multiples(cfg):
        print('the file pads resized images to multiples of 32, which the config does not')
    model = build_model(cfg, checkpoint, args)
    meta = checkpoint.get('meta', {}).get('dataset_meta') or {}
    if not meta.get('classes'):
        sys.exit(f'error: checkpoint {args.checkpoint} must name the classes of its data set')
    meta = {'classes': list(meta['classes']), 'palette': meta.get('palette')}
    print('exporting, some minutes for a deep backbone', flush=True)
    try:
        with whole_file(args.out) as part:
            export_model(model, cfg, part, meta)
            check(model, cfg, part)
    except ValueError as error:
        sys.exit(f'error: {args.config}: {error}')
    print(f'ONNX model: {args.out}')


if __name__ == '__main__':
    main()
