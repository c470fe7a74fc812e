"""Predict on an image or a folder of images; write pictures with the predictions and a JSON.

The JSON is a list with one entry an image. A detector's:
  {"image": NAME, "predictions": [{"category": NAME, "label": INDEX, "score": SCORE,
                                   "bbox": [x1, y1, x2, y2] in pixels, "mask": RLE if any}]}
A segmentor's, whose label maps are PNG files with the class index as pixel value:
  {"image": NAME, "label_map": FILE, "shares": {CLASS: its share of the pixels, largest first}}
An image classifier's, the five best classes:
  {"image": NAME, "predictions": [{"category": NAME, "label": INDEX, "score": SCORE}]}
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.infer import BaseInferencer
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from PIL import Image
from tqdm import tqdm

from acmix_mm.command_line import (
    Parser,
    add_config_arguments,
    check_weights,
    find_images,
    keep_freed_memory,
    load_checkpoint,
    load_config,
    program,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', type=Path, help='image, or folder of images')
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out-dir', type=Path, required=True, help='folder for pictures and predictions.json'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='least score of a detection that is drawn or written (default: %(default)s)',
    )
    parser.add_argument('--batch-size', type=int, default=1, help='default: %(default)s')
    parser.add_argument('--limit', type=int, help='take the first images only')
    parser.add_argument('--device', help='for example cpu or cuda:0 (default: GPU if present)')
    args = parser.parse_args(argv)
    if not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be between 0 and 1, got {args.score_thr}')
    for name in ('batch_size', 'limit'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    return args


def build_inferencer(cfg: Config, checkpoint: dict, args: argparse.Namespace) -> BaseInferencer:
    """Inferencer of the config's package with the checkpoint's weights, which must all be there."""
    import_modules_from_strings(**cfg.get('custom_imports', {'imports': ['acmix_mm']}))
    init_default_scope(cfg.get('default_scope', 'mmdet'))  # mmpretrain's inferencer does not
    if is_segmentor(cfg):
        from mmseg.apis import MMSegInferencer as Inferencer
    elif is_classifier(cfg):
        from mmpretrain.apis import ImageClassificationInferencer as Inferencer
    else:
        from mmdet.apis import DetInferencer as Inferencer

    inferencer = Inferencer(cfg, args.checkpoint, device=args.device)
    check_weights(inferencer.model, checkpoint, args)
    return inferencer


def is_segmentor(cfg: Config) -> bool:
    """Whether a config is mmseg's; otherwise it is mmdet's or mmpretrain's."""
    return cfg.get('default_scope') == 'mmseg'


def is_classifier(cfg: Config) -> bool:
    """Whether a config is mmpretrain's."""
    return cfg.get('default_scope') == 'mmpretrain'


def readable(prediction: dict, classes: tuple[str, ...], score_thr: float) -> list[dict]:
    """An inferencer's parallel lists as one entry a detection, best first."""
    masks = prediction.get('masks', [None] * len(prediction['scores']))
    rows = []
    for label, score, box, mask in zip(
        prediction['labels'], prediction['scores'], prediction['bboxes'], masks, strict=True
    ):
        if score >= score_thr:
            row = {'category': classes[label], 'label': label, 'score': score, 'bbox': box}
            rows.append(row if mask is None else {**row, 'mask': mask})
    return sorted(rows, key=lambda row: -row['score'])


def detect(inferencer: BaseInferencer, images: list[Path], args: argparse.Namespace) -> list[dict]:
    """Entries of detections; writes the pictures."""
    results = inferencer(
        [str(image) for image in images],
        batch_size=args.batch_size,
        out_dir=str(args.out_dir),
        pred_score_thr=args.score_thr,
    )
    classes = inferencer.model.dataset_meta['classes']
    return [
        {'image': image.name, 'predictions': readable(prediction, classes, args.score_thr)}
        for image, prediction in zip(images, results['predictions'], strict=True)
    ]


def segment(inferencer: BaseInferencer, images: list[Path], args: argparse.Namespace) -> list[dict]:
    """Entries of label maps; writes the label maps and the pictures."""
    if args.batch_size > 1 and len({Image.open(image).size for image in images}) > 1:
        sys.exit('error: --batch-size must be 1 for a segmentor and images of different sizes')
    classes = inferencer.model.dataset_meta['classes']
    folder = args.out_dir / 'label_maps'
    folder.mkdir(parents=True, exist_ok=True)
    inferencer.show_progress = False  # it would show a bar for every batch
    entries = []
    for start in tqdm(range(0, len(images), args.batch_size), desc='predict', unit='batch'):
        batch = images[start : start + args.batch_size]
        samples = inferencer(
            [str(image) for image in batch],
            return_datasamples=True,
            batch_size=len(batch),
            out_dir=str(args.out_dir),
            opacity=0.5,
        )
        for image, sample in zip(batch, samples if len(batch) > 1 else [samples], strict=True):
            label_map = sample.pred_sem_seg.data[0].cpu().numpy()
            file = folder / f'{image.stem}.png'
            dtype = np.uint8 if len(classes) <= 256 else np.uint16
            cv2.imwrite(str(file), label_map.astype(dtype))
            counts = np.bincount(label_map.ravel(), minlength=len(classes))
            shares = {
                classes[label]: counts[label] / label_map.size
                for label in np.argsort(-counts, kind='stable')
                if counts[label]
            }
            entries.append(
                {
                    'image': image.name,
                    'label_map': str(file.relative_to(args.out_dir)),
                    'shares': shares,
                }
            )
    return entries


def classify(
    inferencer: BaseInferencer, images: list[Path], args: argparse.Namespace
) -> list[dict]:
    """Entries of the best classes; writes the pictures."""
    classes = inferencer.classes or ()
    if len(classes) != inferencer.model.head.num_classes:
        sys.exit(
            f'error: checkpoint {args.checkpoint} must name the classes of its data set: it names '
            f'{len(classes)}, the model has {inferencer.model.head.num_classes}'
        )
    folder = args.out_dir / 'vis'
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(image) for image in images]
    starts = tqdm(range(0, len(paths), args.batch_size), desc='predict', unit='batch')
    entries = []
    for start, batch in zip(starts, inferencer.preprocess(paths, args.batch_size), strict=True):
        samples = inferencer.forward(batch)
        inferencer.visualize(paths[start : start + len(samples)], samples, show_dir=folder)
        for image, sample in zip(images[start:], samples, strict=False):
            scores, labels = sample.pred_score.topk(min(5, len(classes)))
            rows = [
                {'category': classes[label], 'label': label, 'score': score}
                for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
            ]
            entries.append({'image': image.name, 'predictions': rows})
    return entries


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images = [args.input] if args.input.is_file() else find_images(args.input)
    images = images[: args.limit]
    cfg = load_config(args.config, args.cfg_options)
    keep_freed_memory()
    inferencer = build_inferencer(cfg, load_checkpoint(args.checkpoint), args)
    predict = segment if is_segmentor(cfg) else classify if is_classifier(cfg) else detect
    entries = predict(inferencer, images, args)
    file = args.out_dir / 'predictions.json'
    file.write_text(json.dumps(entries, indent=1))
    print(f'pictures:    {args.out_dir / "vis"} ({len(images)})')
    if is_segmentor(cfg):
        print(f'label maps:  {args.out_dir / "label_maps"}')
    print(f'predictions: {file}')


if __name__ == '__main__':
    main()
