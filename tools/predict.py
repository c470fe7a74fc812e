"""Predict on an image or a folder of images; write pictures with the predictions and a JSON.

The JSON is a list with one entry an image, in the order of their names. A detector's:
  {"image": NAME, "picture": FILE,
   "predictions": [{"category": NAME, "label": INDEX, "score": SCORE,
                    "bbox": [x1, y1, x2, y2] in pixels, "mask": RLE if any}]}
A segmentor's, whose label maps are PNG files with the class index as pixel value:
  {"image": NAME, "picture": FILE, "label_map": FILE,
   "shares": {CLASS: its share of the pixels, largest first}}
An image classifier's, the five best classes:
  {"image": NAME, "picture": FILE,
   "predictions": [{"category": NAME, "label": INDEX, "score": SCORE}]}
Files are named after the image, those of another format STEM.png, or NAME.png for all where two
images have one stem. Pixels are those of the image as it is shown, its EXIF orientation applied.

An image that cannot be read, or for which the model fails, is reported and has the entry
  {"image": NAME, "error": WHY}
The others go on, and the exit status is 1. Interrupted, the program writes entries of what it has
done. Files of an earlier run in the same folder are replaced where they have the same names, and
stay otherwise: the JSON says which are of the last run. Images are never overwritten.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mmcv
import numpy as np
from mmdet.visualization import get_palette
from mmengine.config import Config
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.infer import BaseInferencer
from mmengine.structures import BaseDataElement
from torch import nn
from tqdm import tqdm

from acmix_mm.analysis.images import check_image
from acmix_mm.command_line import (
    IMAGE_SUFFIXES,
    Parser,
    add_config_arguments,
    build_model,
    check_folder,
    device_type,
    find_images,
    keep_freed_memory,
    load_checkpoint,
    load_config,
    nearest_existing,
    program,
)
from acmix_mm.files import claim, encode_picture, write_whole
from acmix_mm.onnx_model import is_onnx, onnx_config
from acmix_mm.weights import build

JSON_FILE = 'predictions.json'
NAMED = 3  # of the images that failed, in the last line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('input', type=Path, help='image, or folder of images')
    add_config_arguments(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint file; none where CONFIG is an ONNX file of tools/deploy/export_model.py',
    )
    parser.add_argument(
        '--out-dir', type=Path, required=True, help=f'folder for pictures and {JSON_FILE}'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='least score of a detection that is drawn or written (default: %(default)s)',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        default=1,
        help='images at a time; a segmentor or classifier takes those of it together that have '
        'one size (default: %(default)s)',
    )
    parser.add_argument('--limit', type=int, help='take the first images only')
    parser.add_argument(
        '--device', type=device_type, help='cpu, cuda or cuda:N (default: GPU if present)'
    )
    args = parser.parse_args(argv)
    if is_onnx(args.config) != (args.checkpoint is None):
        parser.error(
            'CHECKPOINT must be given with a config and not with an ONNX file, got '
            f'{args.config} {args.checkpoint or "alone"}'
        )
    if not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr must be between 0 and 1, got {args.score_thr}')
    for name in ('batch_size', 'limit'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'--{name.replace("_", "-")} must be at least 1, got {value}')
    return args


# Images.


def reason(error: Exception) -> str:
    """What went wrong with one image, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ' '.join(text.split()) or type(error).__name__


def shown(name: str) -> str:
    """A file's name on one line of a terminal."""
    return name if name.isprintable() else ascii(name)


def some_of(names: list[str]) -> str:
    return ', '.join([*map(shown, names[:NAMED]), *(['...'] if len(names) > NAMED else [])])


def check_out_dir(out_dir: Path, images: list[Path]) -> None:
    """Exits with a message unless files can be written to the folder, and to none of the images."""
    check_folder(nearest_existing(out_dir))
    folders = {Path(os.path.realpath(i)).parent for i in images}  # some links lead in circles
    for folder in (out_dir / 'vis', out_dir / 'label_maps'):
        if folder.resolve() in folders:
            sys.exit(
                f'error: --out-dir {out_dir}: what is written to {folder} would overwrite the '
                'images that are in it; choose another folder'
            )


def check_readable(images: list[Path]) -> None:
    """Exits with a message if none of the images can be read."""
    errors = []
    for image in images:
        try:
            return check_image(image)
        except Exception as error:
            errors.append(f'{shown(str(image))}: {reason(error)}')
    count = f'none of {len(images)} images can be read, ' if len(images) > 1 else ''
    sys.exit(f'error: {count}{errors[0]}')


def names_of_outputs(images: list[Path]) -> dict[Path, str]:
    """Stems of what is written for images in another format than theirs, all different."""
    stems = {image.stem for image in images}
    return {i: i.stem if len(stems) == len(images) else i.name for i in images}


# Models, a class for each task.


@dataclass
class Result:
    """What comes of one image: its entry in the JSON, and the files that the entry names."""

    entry: dict
    files: dict[str, bytes]


def of_one_size(loaded: dict[Path, dict]) -> list[dict[Path, dict]]:
    """Images in groups of one size, after the pipeline."""
    groups: dict[tuple[int, ...], dict[Path, dict]] = {}
    for image, data in loaded.items():
        groups.setdefault(tuple(data['inputs'].shape), {})[image] = data
    return [*groups.values()]


@dataclass
class Detector:
    """Predicts with a detector, and says what the tasks have in common.

    Args:
        inferencer (BaseInferencer): Of the model.
        classes (tuple[str, ...]): Names of its classes.
        names (dict[Path, str]): Of :func:`names_of_outputs`.
        score_thr (float): Least score of a detection.
    """

    inferencer: BaseInferencer
    classes: tuple[str, ...]
    names: dict[Path, str]
    score_thr: float

    def load(self, image: Path) -> dict:
        """The image as the pipeline gives it."""
        return self.inferencer.pipeline(str(image))

    def groups(self, loaded: dict[Path, dict]) -> list[dict[Path, dict]]:
        """Images that the model can take together: all, which it pads to one size."""
        return [loaded] if loaded else []

    def forward(self, data: list[dict]) -> list[BaseDataElement]:
        """Predictions for images of one group."""
        return self.inferencer.forward(pseudo_collate(data))

    def predict(self, group: dict[Path, dict]) -> list[Result]:
        """Results for images of one group."""
        samples = self.forward([*group.values()])
        return [self.result(i, s) for i, s in zip(group, samples, strict=True)]

    def result(self, image: Path, sample: BaseDataElement) -> Result:
        """An image's result."""
        described = self.describe(image, sample)
        file, suffix = self.picture(image)
        drawn = self.draw(mmcv.imread(image, channel_order='rgb'), sample)
        entry = {'image': image.name, 'picture': file, **described.entry}
        return Result(entry, {file: encode_picture(drawn, suffix), **described.files})

    def picture(self, image: Path) -> tuple[str, str]:
        """Name and suffix of the picture with the predictions."""
        if image.suffix.lower() in IMAGE_SUFFIXES:
            return f'vis/{image.name}', image.suffix
        return f'vis/{image.name}.png', '.png'

    def describe(self, image: Path, sample: BaseDataElement) -> Result:
        """The task's part of a result."""
        (prediction,) = self.inferencer.postprocess([sample])['predictions']
        return Result({'predictions': self.readable(prediction)}, {})

    def readable(self, prediction: dict) -> list[dict]:
        """An inferencer's parallel lists as one entry a detection, best first."""
        masks = prediction.get('masks', [None] * len(prediction['scores']))
        rows = []
        for label, score, box, mask in zip(
            prediction['labels'], prediction['scores'], prediction['bboxes'], masks, strict=True
        ):
            if score >= self.score_thr:
                row = {'category': self.classes[label], 'label': label, 'score': score, 'bbox': box}
                rows.append(row if mask is None else {**row, 'mask': mask})
        return sorted(rows, key=lambda row: -row['score'])

    def draw(self, picture: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """An RGB picture with the predictions."""
        return self.inferencer.visualize(
            [picture], [sample], return_vis=True, pred_score_thr=self.score_thr
        )[0]


@dataclass
class Segmentor(Detector):
    """Predicts with a segmentor."""

    def __post_init__(self) -> None:
        meta = self.inferencer.model.dataset_meta
        if not meta['palette']:  # mmseg would take that of Cityscapes
            colours = get_palette('random', len(self.classes))
            meta['palette'] = [tuple(map(int, colour)) for colour in colours]

    def groups(self, loaded: dict[Path, dict]) -> list[dict[Path, dict]]:
        return of_one_size(loaded)

    def describe(self, image: Path, sample: BaseDataElement) -> Result:
        label_map = sample.pred_sem_seg.data[0].cpu().numpy()
        file = f'label_maps/{self.names[image]}.png'
        dtype = np.uint8 if len(self.classes) <= 256 else np.uint16
        counts = np.bincount(label_map.ravel(), minlength=len(self.classes))
        shares = {
            self.classes[label]: counts[label] / label_map.size
            for label in np.argsort(-counts, kind='stable')
            if counts[label]
        }
        files = {file: encode_picture(label_map.astype(dtype), '.png')}
        return Result({'label_map': file, 'shares': shares}, files)

    def draw(self, picture: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        # Imported here, as it imports mmseg, which the other tasks do without.
        from acmix_mm.segmentation_pictures import draw_classes

        label_map = sample.pred_sem_seg.cpu().data[0].numpy()
        meta = self.inferencer.model.dataset_meta
        return draw_classes(picture, {'prediction': label_map}, self.classes, meta['palette'])


class Classifier(Detector):
    """Predicts with an image classifier."""

    def groups(self, loaded: dict[Path, dict]) -> list[dict[Path, dict]]:
        return of_one_size(loaded)

    def load(self, image: Path) -> dict:
        picture = mmcv.imread(image)
        shape = picture.shape[:2]
        return self.inferencer.pipeline({'img': picture, 'img_shape': shape, 'ori_shape': shape})

    def forward(self, data: list[dict]) -> list[BaseDataElement]:
        return self.inferencer.forward(default_collate(data))

    def picture(self, image: Path) -> tuple[str, str]:
        return f'vis/{self.names[image]}.png', '.png'

    def describe(self, image: Path, sample: BaseDataElement) -> Result:
        scores, labels = sample.pred_score.topk(min(5, len(self.classes)))
        rows = [
            {'category': self.classes[label], 'label': label, 'score': score}
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
        return Result({'predictions': rows}, {})

    def draw(self, picture: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        from mmpretrain.visualization import UniversalVisualizer

        visualizer = UniversalVisualizer()
        return visualizer.visualize_cls(picture, sample, classes=self.classes, draw_gt=False)


def build_inferencer(
    cfg: Config, checkpoint: dict | None, args: argparse.Namespace
) -> BaseInferencer:
    """Inferencer of the config's package with the checkpoint's weights, which must all be there.

    Without a checkpoint, the model is one that needs none.
    """
    # Inferencers go on with what does not fit. It also sets the scope, which mmpretrain's does not.
    if checkpoint is None:
        model = build(cfg)
    else:
        build_model(cfg, checkpoint, args)
    if is_segmentor(cfg):
        from mmseg.apis import MMSegInferencer as Inferencer
    elif is_classifier(cfg):
        from mmpretrain.apis import ImageClassificationInferencer as Inferencer
    else:
        from mmdet.apis import DetInferencer as Inferencer

    if 'visualizer' in cfg:
        cfg.visualizer.vis_backends = None  # pictures are written here
    if checkpoint is not None:
        return Inferencer(cfg, args.checkpoint, device=args.device)
    options = {} if is_segmentor(cfg) else {'palette': 'random'}  # or it asks the data set
    with warnings.catch_warnings(action='ignore'):  # that weights were random
        inferencer = Inferencer(cfg, None, device='cpu', **options)
    meta = {'palette': None, **model.dataset_meta}
    if not is_segmentor(cfg) and meta['palette'] is None:
        meta['palette'] = 'random'
    inferencer.model.dataset_meta = inferencer.visualizer.dataset_meta = meta
    return inferencer


def is_segmentor(cfg: Config) -> bool:
    """Whether a config is mmseg's; otherwise it is mmdet's or mmpretrain's."""
    return cfg.get('default_scope') == 'mmseg'


def is_classifier(cfg: Config) -> bool:
    """Whether a config is mmpretrain's."""
    return cfg.get('default_scope') == 'mmpretrain'


def classes_of(inferencer: BaseInferencer, args: argparse.Namespace) -> tuple[str, ...]:
    """Names of the model's classes; exits with a message if they are not as many."""
    model = inferencer.model
    if hasattr(inferencer, 'classes'):  # mmpretrain's
        classes = inferencer.classes
    else:
        classes = model.dataset_meta['classes']
    classes = tuple(classes or ())
    count = num_classes(model)
    if count not in (None, len(classes)):
        sys.exit(
            f'error: checkpoint {args.checkpoint} must name the classes of its data set: it names '
            f'{len(classes)}, the model has {count}'
        )
    return classes


def num_classes(model: nn.Module) -> int | None:
    """Classes of the last head, None where it does not say, or panoptic heads have some more."""
    if hasattr(model, 'panoptic_fusion_head'):
        return None
    for name in ('head', 'decode_head', 'bbox_head', 'roi_head.bbox_head'):
        head = model
        for part in name.split('.'):
            head = getattr(head, part, None)
        if head is not None:
            head = head[-1] if isinstance(head, nn.ModuleList) else head
            return getattr(head, 'num_classes', None)
    return None


# The run.


def predict(predictor: Detector, images: list[Path], args: argparse.Namespace) -> Iterator[Result]:
    """Results in any order within a batch; of an image that fails, without files."""

    def failed(image: Path, error: Exception) -> Result:
        trace = f'\n{traceback.format_exc()}' if args.traceback else ''
        tqdm.write(f'{shown(image.name)}: {reason(error)}{trace}', file=sys.stderr)
        return Result({'image': image.name, 'error': reason(error)}, {})

    starts = range(0, len(images), args.batch_size)
    for start in tqdm(starts, desc='predict', unit='batch'):
        loaded = {}
        for image in images[start : start + args.batch_size]:
            try:
                check_image(image)
                loaded[image] = predictor.load(image)
            except Exception as error:
                yield failed(image, error)
        groups = predictor.groups(loaded)
        while groups:
            group = groups.pop()
            try:
                results = predictor.predict(group)
            except Exception as error:
                if len(group) == 1:
                    results = [failed(*group, error)]
                else:  # find out which it is
                    groups += [{image: data} for image, data in group.items()]
                    continue
            yield from results


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Context with the signals that ask for an end, to be heeded where nothing is half done.

    An exception that a signal raises anywhere may also get lost, as in a callback of a library. A
    second signal raises one nevertheless.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write(entries: dict[str, dict], images: list[Path], file: Path) -> None:
    """Write the JSON with the entries, by names of images, that there are."""
    rows = [entries[image.name] for image in images if image.name in entries]
    write_whole(file, json.dumps(rows, indent=1))


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images = [args.input] if args.input.is_file() else find_images(args.input)
    check_out_dir(args.out_dir, images)
    images = images[: args.limit]
    onnx = is_onnx(args.config)
    cfg = onnx_config(args.config) if onnx else load_config(args.config, args.cfg_options)
    check_readable(images)
    checkpoint = None if onnx else load_checkpoint(args.checkpoint)
    keep_freed_memory()
    inferencer = build_inferencer(cfg, checkpoint, args)
    kind = Segmentor if is_segmentor(cfg) else Classifier if is_classifier(cfg) else Detector
    classes = classes_of(inferencer, args)
    predictor = kind(inferencer, classes, names_of_outputs(images), args.score_thr)
    for folder in ('vis', *(['label_maps'] if is_segmentor(cfg) else [])):
        (args.out_dir / folder).mkdir(parents=True, exist_ok=True)
    file = args.out_dir / JSON_FILE
    entries: dict[str, dict] = {}
    with claim(args.out_dir), noted_signals() as came:
        try:
            for result in predict(predictor, images, args):
                for name, content in result.files.items():
                    write_whole(args.out_dir / name, content)
                entries[result.entry['image']] = result.entry
                if came:
                    raise KeyboardInterrupt
        finally:  # what is done is not lost
            write(entries, images, file)
    failed = [name for name, entry in entries.items() if 'error' in entry]
    print(f'pictures:    {args.out_dir / "vis"} ({len(entries) - len(failed)})')
    if is_segmentor(cfg):
        print(f'label maps:  {args.out_dir / "label_maps"}')
    print(f'predictions: {file}')
    if failed:
        sys.exit(
            f'error: {len(failed)} of {len(images)} images could not be predicted: '
            f'{some_of(failed)}; {file} says why'
        )


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
