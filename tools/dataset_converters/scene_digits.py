"""Make the small real data set *scene digits*.

Handwritten digits (the 1,797 of scikit-learn) stand at random places, sizes and colours, partly
over one another, on random crops of real photographs (scikit-image's and scikit-learn's). Train and
val share neither digits nor photographs; half of the training crops are recoloured. The same images
are written in two layouts, and smaller ones with a single digit in a third:

  OUT/coco/{train2017,val2017}/*.jpg                    COCO instances: boxes, areas, RLE masks
  OUT/coco/annotations/instances_{train,val}2017.json
  OUT/ade/images/{training,validation}/*.jpg            ADE20K: label maps, 0 is background,
  OUT/ade/annotations/{training,validation}/*.png       digit d is d + 1
  OUT/imagenet/{train,val}/{0,...,9}/*.jpg              ImageNet: a folder for each class
"""

import argparse
import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from pycocotools import mask as coco_mask
from sklearn.datasets import load_digits, load_sample_image
from tqdm import tqdm

from acmix_mm.command_line import Parser, program
from acmix_mm.files import claim, encode_picture, naming

PHOTOGRAPHS: dict[str, dict[str, Callable[[], np.ndarray]]] = {
    'train': {
        'astronaut': skimage.data.astronaut,
        'brick': skimage.data.brick,
        'camera': skimage.data.camera,
        'cat': skimage.data.cat,
        'china': lambda: load_sample_image('china.jpg'),
        'coins': skimage.data.coins,
        'grass': skimage.data.grass,
        'hubble': skimage.data.hubble_deep_field,
        'immunohistochemistry': skimage.data.immunohistochemistry,
        'moon': skimage.data.moon,
        'motorcycle': lambda: skimage.data.stereo_motorcycle()[0],
        'retina': skimage.data.retina,
        'rocket': skimage.data.rocket,
    },
    'val': {
        'coffee': skimage.data.coffee,
        'flower': lambda: load_sample_image('flower.jpg'),
        'gravel': skimage.data.gravel,
    },
}
ADE_NAMES = {'train': 'training', 'val': 'validation'}
LAYOUTS = ('coco', 'ade', 'imagenet')
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95)
DIGIT_SHARE_TRAIN = 0.8
MIN_CONTRAST = 160  # least Euclidean distance of a digit's RGB colour to the mean behind it
MAX_COVERED = 0.25  # of an earlier digit's visible pixels, by a later one
TRIES = 30  # to find a place for a digit


@dataclass
class Digit:
    """One digit in an image: its class and its visible pixels."""

    label: int
    mask: np.ndarray  # (H, W) bool


def photographs(split: str, size: int) -> list[np.ndarray]:
    """RGB uint8 photographs of a split, enlarged so that a crop of ``size`` pixels fits."""
    images = []
    for load in PHOTOGRAPHS[split].values():
        image = np.asarray(load())
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        factor = max(1, size / min(image.shape[:2]))
        if factor > 1:
            image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        images.append(image)
    return images


def digits(split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 8, 8) in [0, 1] and labels (n,) of a split; ``rng`` must be seeded alike."""
    data = load_digits()
    order = rng.permutation(len(data.target))
    count = round(DIGIT_SHARE_TRAIN * len(order))
    chosen = order[:count] if split == 'train' else order[count:]
    return data.images[chosen].astype(np.float32) / 16, data.target[chosen]


def recolour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An RGB image with another hue, saturation and brightness."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.integers(180)) % 180  # OpenCV counts hue in 180 steps
    hsv[..., 1:] *= rng.uniform((0.3, 0.6), (1.5, 1.3))
    return cv2.cvtColor(hsv.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)


def background(
    images: list[np.ndarray], size: int, vary: bool, rng: np.random.Generator
) -> np.ndarray:
    """A random square crop of a random photograph, scaled to ``size``.

    With ``vary``, half of the crops are mirrored and half recoloured, because photographs are few.
    """
    image = images[rng.integers(len(images))]
    side = rng.integers(size, min(image.shape[:2]) + 1)
    y = rng.integers(image.shape[0] - side + 1)
    x = rng.integers(image.shape[1] - side + 1)
    crop = image[y : y + side, x : x + side]
    crop = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)
    if vary and rng.random() < 0.5:
        crop = crop[:, ::-1].copy()
    return recolour(crop, rng) if vary and rng.random() < 0.5 else crop


def stamp(glyph: np.ndarray, size: int) -> np.ndarray:
    """Opacity (size, size) in [0, 1] of an 8x8 digit at ``size`` pixels."""
    glyph = cv2.resize(glyph, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip((glyph - 0.25) / 0.3, 0, 1)


def colour_on(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random RGB colour that stands out from the mean of ``patch``."""
    mean = patch.reshape(-1, 3).mean(0)
    while True:
        colour = rng.integers(0, 256, 3).astype(np.float32)
        if np.linalg.norm(colour - mean) >= MIN_CONTRAST:
            return colour


def draw(
    images: list[np.ndarray],
    glyphs: np.ndarray,
    labels: np.ndarray,
    size: int,
    count: tuple[int, int],
    digit_size: tuple[int, int],
    vary: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, list[Digit]]:
    """One picture (size, size, 3) RGB and the digits in it."""
    canvas = background(images, size, vary, rng).astype(np.float32)
    placed: list[Digit] = []
    for _ in range(rng.integers(count[0], count[1] + 1)):
        index = rng.integers(len(labels))
        for _ in range(TRIES):
            side = int(rng.integers(digit_size[0], digit_size[1] + 1))
            y, x = rng.integers(size - side + 1, size=2)
            place = np.s_[y : y + side, x : x + side]
            opacity = stamp(glyphs[index], side)
            mask = np.zeros((size, size), bool)
            mask[place] = opacity > 0.5
            covered = [(mask & other.mask).sum() / other.mask.sum() for other in placed]
            if max(covered, default=0) <= MAX_COVERED:
                break
        else:
            continue
        colour = colour_on(canvas[place], rng)
        canvas[place] += opacity[..., None] * (colour - canvas[place])
        for other in placed:
            other.mask &= ~mask
        placed.append(Digit(int(labels[index]), mask))
    return canvas.round().clip(0, 255).astype(np.uint8), placed


def annotation(digit: Digit, image_id: int, annotation_id: int) -> dict:
    """COCO instance annotation: [x, y, width, height] box, area in pixels, compressed RLE."""
    rle = coco_mask.encode(np.asfortranarray(digit.mask, np.uint8))
    return {
        'id': annotation_id,
        'image_id': image_id,
        'category_id': digit.label + 1,
        'bbox': coco_mask.toBbox(rle).tolist(),
        'area': float(coco_mask.area(rle)),
        'segmentation': {'size': rle['size'], 'counts': rle['counts'].decode()},
        'iscrowd': 0,
    }


def write_scenes(
    root: Path,
    split: str,
    num_images: int,
    size: int,
    count: tuple[int, int],
    digit_size: tuple[int, int],
    seed: int,
) -> None:
    """Write one split with several digits an image, in the layouts of COCO and ADE20K."""
    glyphs, labels = digits(split, np.random.default_rng(seed))
    images = photographs(split, size)
    rng = np.random.default_rng((seed, list(PHOTOGRAPHS).index(split)))
    coco_images = root / 'coco' / f'{split}2017'
    ade_images = root / 'ade' / 'images' / ADE_NAMES[split]
    ade_maps = root / 'ade' / 'annotations' / ADE_NAMES[split]
    coco_json = root / 'coco' / 'annotations' / f'instances_{split}2017.json'
    for folder in (coco_images, ade_images, ade_maps, coco_json.parent):
        folder.mkdir(parents=True, exist_ok=True)

    records, annotations = [], []
    for image_id in tqdm(range(1, num_images + 1), desc=f'scene digits {split}', unit='image'):
        picture, placed = draw(
            images, glyphs, labels, size, count, digit_size, split == 'train', rng
        )
        name = f'{image_id:012d}'
        content = encode_picture(picture, '.jpg', JPEG)
        for folder in (coco_images, ade_images):
            (folder / f'{name}.jpg').write_bytes(content)
        label_map = np.zeros((size, size), np.uint8)
        for digit in placed:
            label_map[digit.mask] = digit.label + 1
            annotations.append(annotation(digit, image_id, len(annotations) + 1))
        (ade_maps / f'{name}.png').write_bytes(encode_picture(label_map, '.png'))
        records.append({'id': image_id, 'file_name': f'{name}.jpg', 'width': size, 'height': size})
    content = {
        'info': {'description': f'scene digits, {split}, seed {seed}'},
        'licenses': [],
        'images': records,
        'annotations': annotations,
        'categories': [{'id': d + 1, 'name': str(d), 'supercategory': 'digit'} for d in range(10)],
    }
    coco_json.write_text(json.dumps(content))


def write_single_digits(
    root: Path, split: str, num_images: int, size: int, digit_size: tuple[int, int], seed: int
) -> None:
    """Write one split with one digit an image, as many of each, in the layout of ImageNet."""
    glyphs, labels = digits(split, np.random.default_rng(seed))
    images = photographs(split, size)
    rng = np.random.default_rng((seed, list(PHOTOGRAPHS).index(split), 1))
    folder = root / 'imagenet' / split
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True)
    for index in tqdm(range(num_images), desc=f'single digits {split}', unit='image'):
        digit = index % 10
        chosen = labels == digit
        picture, _ = draw(
            images, glyphs[chosen], labels[chosen], size, (1, 1), digit_size, split == 'train', rng
        )
        file = folder / str(digit) / f'{index:06d}.jpg'
        file.write_bytes(encode_picture(picture, '.jpg', JPEG))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, help='folder to make, for example data/scene_digits')
    parser.add_argument('--train', type=int, default=2400, help='training images (%(default)s)')
    parser.add_argument('--val', type=int, default=200, help='validation images (%(default)s)')
    parser.add_argument('--size', type=int, default=96, help='image side, pixels (%(default)s)')
    parser.add_argument(
        '--single-train', type=int, default=6000, help='training images of one digit (%(default)s)'
    )
    parser.add_argument(
        '--single-val', type=int, default=1000, help='validation images of one digit (%(default)s)'
    )
    parser.add_argument('--single-size', type=int, default=48, help='their side (%(default)s)')
    parser.add_argument(
        '--digits',
        type=int,
        nargs=2,
        default=(1, 4),
        metavar=('MIN', 'MAX'),
        help='digits in an image (1 4)',
    )
    parser.add_argument(
        '--digit-size',
        type=int,
        nargs=2,
        default=(22, 46),
        metavar=('MIN', 'MAX'),
        help='side of a digit, pixels (22 46)',
    )
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument(
        '--force', action='store_true', help='replace the folders in OUT where they exist'
    )
    args = parser.parse_args(argv)
    least_values = {
        'train': 1,
        'val': 1,
        'size': 1,
        'single_train': 10,
        'single_val': 10,
        'seed': 0,
    }
    for name, least in least_values.items():
        if getattr(args, name) < least:
            option = name.replace('_', '-')
            parser.error(f'--{option} must be at least {least}, got {getattr(args, name)}')
    most_size = min(args.size, args.single_size)
    for name, least, most in (('digits', 0, None), ('digit_size', 8, most_size)):
        low, high = getattr(args, name)
        if not least <= low <= high or (most is not None and high > most):
            bound = f'{least} <= MIN <= MAX' + (f' <= image side ({most})' if most else '')
            parser.error(f'--{name.replace("_", "-")} must satisfy {bound}, got {low} {high}')
    return args


def check_existing(args: argparse.Namespace) -> None:
    existing = [args.out / name for name in LAYOUTS if (args.out / name).exists()]
    if existing and not args.force:
        sys.exit(
            f'error: {" and ".join(map(str, existing))} exist; give --force to replace, '
            'or another folder'
        )


@contextlib.contextmanager
def folder_to_fill(out: Path) -> Iterator[Path]:
    """Context with a hidden folder in ``out``, this process's alone, that is removed afterwards.

    After a kill it stays until the next process has it.
    """
    part = out / '.part-scene_digits'
    part.mkdir(parents=True, exist_ok=True)
    with claim(part):
        for left_over in ('new', 'old'):
            shutil.rmtree(part / left_over, ignore_errors=True)
        try:
            with naming(out):
                yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


@program
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_existing(args)
    with folder_to_fill(args.out) as part:
        check_existing(args)  # another process may have been quicker
        new, old = part / 'new', part / 'old'
        for split, scenes, single in (
            ('train', args.train, args.single_train),
            ('val', args.val, args.single_val),
        ):
            write_scenes(new, split, scenes, args.size, args.digits, args.digit_size, args.seed)
            write_single_digits(new, split, single, args.single_size, args.digit_size, args.seed)
        old.mkdir()
        for name in LAYOUTS:
            if (args.out / name).exists():
                (args.out / name).rename(old / name)
            (new / name).rename(args.out / name)
    print(f'COCO layout:     {args.out / "coco"}')
    print(f'ADE20K layout:   {args.out / "ade"}')
    print(f'ImageNet layout: {args.out / "imagenet"}')


if __name__ == '__main__':
    main()
