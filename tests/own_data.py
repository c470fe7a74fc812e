"""Data of one's own, as a user may have them: coins with boxes and masks, textures with labels.

``python tests/own_data.py coins FOLDER`` and ``... textures FOLDER`` make them of scikit-image's
pictures, as docs/own_data.md has it. What is validated on comes from other parts of these than what
is trained on.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from skimage import data, filters, measure, segmentation

COINS = ('coin',)
TEXTURES = ('rocket', 'grass', 'brick', 'gravel')
CROP = 128
TEMPLATES = Path(__file__).resolve().parents[1] / 'configs' / 'own_data'
# What a user changes at the top of a template.
OF_COINS = {'data_root': 'data/coins/', 'classes': COINS, 'size': (CROP, CROP)}
CHANGES = {
    'detection': OF_COINS,
    'instance': OF_COINS,
    'semantic': {
        'data_root': 'data/textures/', 'classes': TEXTURES, 'size': CROP, 'suffix': '.png'
    },
}  # fmt: skip


def find_coins() -> tuple[np.ndarray, np.ndarray]:
    """The picture of coins, and for each pixel the number of its coin, 0 between them."""
    picture = data.coins()
    markers = np.where(picture < 30, 1, np.where(picture > 150, 2, 0))
    found = segmentation.watershed(filters.sobel(picture), markers) == 2
    labels = measure.label(ndimage.binary_fill_holes(found))
    for region in measure.regionprops(labels):
        if region.area < 500:
            labels[labels == region.label] = 0
    return picture, labels


def make_coins(root: Path, train: int = 64, val: int = 16) -> None:
    """Crops with boxes and masks in COCO's format: train/, val/, annotations/."""
    rng = np.random.default_rng(0)
    picture, labels = find_coins()
    areas = {r.label: r.area for r in measure.regionprops(labels)}
    left = picture.shape[1] - CROP - 16  # what is right of it is for validation
    for split, count, columns in (('train', train, (0, left - CROP)), ('val', val, (left, None))):
        images, annotations = [], []
        for i in range(count):
            y = rng.integers(picture.shape[0] - CROP + 1)
            x = rng.integers(columns[0], columns[1] or picture.shape[1] - CROP + 1)
            window = slice(y, y + CROP), slice(x, x + CROP)
            (root / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[window]).save(root / split / f'{i}.png')
            images.append({'id': i, 'file_name': f'{i}.png', 'width': CROP, 'height': CROP})
            for number in np.unique(labels[window]):
                mask = np.asfortranarray(labels[window] == number, np.uint8)
                if number and mask.sum() > areas[number] / 3:  # most of it is in the crop
                    runs = coco_mask.encode(mask)
                    annotations.append({
                        'id': len(annotations) + 1, 'image_id': i, 'iscrowd': 0,
                        'category_id': 1, 'area': int(mask.sum()),
                        'bbox': coco_mask.toBbox(runs).tolist(),
                        'segmentation': {**runs, 'counts': runs['counts'].decode()},
                    })  # fmt: skip
        categories = [{'id': k + 1, 'name': name} for k, name in enumerate(COINS)]
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        file = root / 'annotations' / f'{split}.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))


def make_textures(root: Path, train: int = 64, val: int = 16) -> None:
    """Patches of textures on a photograph, PNG as pictures and labels: images/, labels/."""
    rng = np.random.default_rng(0)
    pictures = [getattr(data, name)() for name in TEXTURES]
    pictures = [np.stack([p] * 3, -1) if p.ndim == 2 else p for p in pictures]
    grid = np.stack(np.mgrid[:CROP, :CROP], -1)
    for split, count in (('train', train), ('val', val)):
        for folder in ('images', 'labels'):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, labels = np.zeros((CROP, CROP, 3), np.uint8), np.zeros((CROP, CROP), np.uint8)
            centres = rng.integers(CROP, size=(6, 2))
            nearest = np.square(grid[:, :, None] - centres).sum(-1).argmin(-1)
            kinds = np.where(np.arange(6) < 3, 0, rng.integers(1, len(TEXTURES), 6))
            for label, texture in enumerate(pictures):
                half = texture.shape[1] // 2
                x = rng.integers(half - CROP) + (half if split == 'val' else 0)
                y = rng.integers(texture.shape[0] - CROP)
                region = kinds[nearest] == label
                image[region] = texture[y : y + CROP, x : x + CROP][region]
                labels[region] = label
            Image.fromarray(image).save(root / 'images' / split / f'{i}.png')
            Image.fromarray(labels).save(root / 'labels' / split / f'{i}.png')


def write_config(task: str, file: Path, **changes: object) -> None:
    """A copy of a template, anywhere, with other values at its top."""
    text = (TEMPLATES / f'{task}.py').read_text()
    for name, value in {**CHANGES[task], **changes}.items():
        text, count = re.subn(f'^{name} = .*', f'{name} = {value!r}', text, flags=re.MULTILINE)
        assert count == 1, name
    file.write_text(text.replace("'../_base_/", f"'{TEMPLATES.parent}/_base_/"))


if __name__ == '__main__':
    {'coins': make_coins, 'textures': make_textures}[sys.argv[1]](Path(sys.argv[2]))
