"""Very small data sets in three layouts, and what can be wrong with them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 40)  # width, height
NAMES = ('cat', 'dog', 'owl')
COUNT = 3


def picture(file: Path, size: tuple[int, int] = SIZE, mode: str = 'RGB', seed: int = 0) -> None:
    """A picture of noise."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], channels), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.squeeze(2) if channels == 1 else noise, mode).save(file)


def make_coco(root: Path) -> None:
    """Two splits of pictures, each with a box and a mask of each class."""
    width, height = SIZE
    for split in ('train', 'val'):
        images, annotations = [], []
        for i in range(COUNT):
            images.append({'id': i, 'file_name': f'{i}.png', 'width': width, 'height': height})
            picture(root / f'{split}2017' / f'{i}.png', seed=i + 10 * (split == 'val'))
            for k in range(len(NAMES)):
                corners = [8, 4, 28, 4, 28, 20, 8, 20]
                annotations.append({
                    'id': len(annotations), 'image_id': i, 'category_id': k + 1, 'iscrowd': 0,
                    'bbox': [8, 4, 20, 16], 'area': 320, 'segmentation': [corners],
                })  # fmt: skip
        categories = [{'id': k + 1, 'name': name} for k, name in enumerate(NAMES)]
        content = {'images': images, 'annotations': annotations, 'categories': categories}
        file = root / 'annotations' / f'instances_{split}2017.json'
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))


def make_ade(root: Path) -> None:
    """Two splits of pictures with label maps of three classes."""
    for number, split in enumerate(('training', 'validation')):
        for i in range(COUNT):
            picture(root / 'images' / split / f'{i}.jpg', seed=i + 10 * number)
            labels = np.random.default_rng(i).integers(0, len(NAMES), SIZE[::-1], np.uint8)
            file = root / 'annotations' / split / f'{i}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(labels).save(file)


def make_imagenet(root: Path) -> None:
    """Two splits with a folder for each of three classes."""
    for number, split in enumerate(('train', 'val')):
        for k, name in enumerate(NAMES):
            for i in range(2):
                picture(root / split / name / f'{i}.png', seed=i + 10 * number + 100 * k)


def coco_file(root: Path, split: str = 'train') -> Path:
    return root / 'annotations' / f'instances_{split}2017.json'


def edit(change: Callable[[dict], object], split: str = 'train') -> Callable[[Path], None]:
    """A change of what an annotation file holds, in place."""

    def act(root: Path) -> None:
        file = coco_file(root, split)
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return act


def write(content: bytes) -> Callable[[Path], None]:
    return lambda root: coco_file(root).write_bytes(content)


def annotation(**changes: object) -> Callable[[Path], None]:
    """Another value of keys of the second annotation; None: without the key."""

    def change(content: dict) -> None:
        target = content['annotations'][1]
        target.update(changes)
        for key, value in changes.items():
            if value is None:
                del target[key]

    return edit(change)


def image(**changes: object) -> Callable[[Path], None]:
    """Another value of keys of the second image; None: without the key."""

    def change(content: dict) -> None:
        target = content['images'][1]
        target.update(changes)
        for key, value in changes.items():
            if value is None:
                del target[key]

    return edit(change)


def rle(counts: object, size: object = (40, 48)) -> dict:
    return {'size': list(size) if isinstance(size, tuple) else size, 'counts': counts}


def drop(key: str) -> Callable[[Path], None]:
    return edit(lambda content: content.pop(key))


def put(key: str, value: object) -> Callable[[Path], None]:
    return edit(lambda content: content.update({key: value}))


def category(number: int, **changes: object) -> Callable[[Path], None]:
    return edit(lambda content: content['categories'][number].update(changes))


def replace(relative: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in the place of a file."""

    def act(root: Path) -> None:
        (root / relative).unlink()
        make(root / relative)

    return act


TRAIN = 'annotations/instances_train2017.json'
VAL = 'annotations/instances_val2017.json'
BOTH_SWAPPED = [{'id': 1, 'name': 'dog'}, {'id': 2, 'name': 'cat'}, {'id': 3, 'name': 'owl'}]

# Name: what is done to the data set in COCO's layout, what the message must hold.
BAD_ANNOTATIONS = {
    'file is missing': (lambda root: coco_file(root).unlink(), [TRAIN, 'does not exist']),
    'file of val is missing': (lambda root: coco_file(root, 'val').unlink(), [VAL, 'not exist']),
    'folder is missing': (
        lambda root: (root / 'annotations').rename(root / 'x'), [TRAIN, 'README']
    ),
    'file is a folder': (replace(TRAIN, Path.mkdir), [TRAIN, 'is no file']),
    'file is a broken link': (replace(TRAIN, lambda f: f.symlink_to('nothing')), [TRAIN]),
    'file is a link to itself': (replace(TRAIN, lambda f: f.symlink_to(f)), [TRAIN]),
    'file is a pipe without an end': (replace(TRAIN, os.mkfifo), [TRAIN]),
    'file is empty': (write(b''), [TRAIN, 'is empty']),
    'file is white space': (write(b' \n'), [TRAIN, 'is empty']),
    'file is text': (write(b'image,x,y\n'), [TRAIN, 'no JSON', 'line 1']),
    'file ends early': (
        lambda root: coco_file(root).write_bytes(coco_file(root).read_bytes()[:300]),
        [TRAIN, 'no JSON'],
    ),
    'file is binary': (write(bytes(range(256))), [TRAIN, 'cannot be read']),
    'file nests too deeply': (write(b'[' * 100_000), [TRAIN, 'no JSON']),
    'top level is a list': (write(b'[{}]'), [TRAIN, 'top level is list']),
    'top level is a number': (write(b'3'), [TRAIN, 'top level is int']),
    'top level is text': (write(b'"images"'), [TRAIN, 'top level is str']),
    'without images': (drop('images'), [TRAIN, 'no key images']),
    'without annotations': (drop('annotations'), [TRAIN, 'no key annotations']),
    'without categories': (drop('categories'), [TRAIN, 'no key categories']),
    'images are null': (put('images', None), [TRAIN, 'images is NoneType']),
    'annotations are an object': (put('annotations', {}), [TRAIN, 'annotations is dict']),
    'categories are text': (put('categories', 'cat'), [TRAIN, 'categories is str']),
    'no images': (put('images', []), [TRAIN, 'images is empty']),
    'no categories': (put('categories', []), [TRAIN, "class 'cat'"]),
    'an image is a list': (
        edit(lambda content: content['images'].append([1])), [TRAIN, 'images[3] is [1]']
    ),
    'image without id': (image(id=None), [TRAIN, 'images[1] has no id']),
    'image without file_name': (image(file_name=None), [TRAIN, 'image 1 has no file_name']),
    'image without height': (image(height=None), [TRAIN, 'image 1 has no height']),
    'image without width': (image(width=None), [TRAIN, 'image 1 has no width']),
    'image id is a list': (image(id=[1]), [TRAIN, 'images[1] has id [1]']),
    'image id twice': (image(id=0), [TRAIN, 'image 0 is there twice']),
    'image height 0': (image(height=0), [TRAIN, 'image 1', 'height 0', 'at least 1']),
    'image width negative': (image(width=-48), [TRAIN, 'image 1', 'width -48']),
    'image height NaN': (image(height=float('nan')), [TRAIN, 'image 1', 'height nan']),
    'image width is text': (image(width='48'), [TRAIN, 'image 1', "width '48'"]),
    'image size is another': (image(width=40, height=48), ['train2017/1.png', '48x40', '40x48']),
    'file_name is empty': (image(file_name=''), [TRAIN, 'image 1', "file_name ''"]),
    'file_name is a number': (image(file_name=1), [TRAIN, 'image 1', 'file_name 1']),
    'file_name leaves the folder': (
        image(file_name='../../etc/passwd'), [TRAIN, 'image 1', '../../etc/passwd', 'train2017']
    ),
    'file_name leaves the folder inside': (
        image(file_name='a/../../val2017/0.png'), [TRAIN, 'image 1', 'file below']
    ),
    'file_name is absolute': (image(file_name='/etc/passwd'), [TRAIN, 'image 1', '/etc/passwd']),
    'file_name has a zero byte': (image(file_name='a\0b'), ['a\0b', 'does not exist']),
    'an annotation is a number': (
        edit(lambda content: content['annotations'].append(7)), [TRAIN, 'annotations has 7']
    ),
    'annotation without id': (annotation(id=None), [TRAIN, 'id']),
    'annotation id is a list': (annotation(id=[1]), [TRAIN, 'id [1]']),
    'annotation id twice': (annotation(id=0), [TRAIN, 'annotation 0 is there twice']),
    'annotation without bbox': (annotation(bbox=None), [TRAIN, 'annotation 1', 'no bbox']),
    'annotation without area': (annotation(area=None), [TRAIN, 'annotation 1', 'no area']),
    'annotation without category_id': (
        annotation(category_id=None), [TRAIN, 'annotation 1', 'no category_id']
    ),
    'annotation without image_id': (
        annotation(image_id=None), [TRAIN, 'annotation 1', 'no image_id']
    ),
    'area NaN': (annotation(area=float('nan')), [TRAIN, 'annotation 1', 'area nan']),
    'area is text': (annotation(area='320'), [TRAIN, 'annotation 1', "area '320'"]),
    'bbox with NaN': (
        annotation(bbox=[0, float('nan'), 3, 4]), [TRAIN, 'annotation 1: bbox [0, nan, 3, 4]']
    ),
    'bbox with Infinity': (
        annotation(bbox=[0, 0, float('inf'), 4]), [TRAIN, 'annotation 1: bbox', 'inf', 'finite']
    ),
    'bbox of negative width': (annotation(bbox=[9, 9, -3, 4]), [TRAIN, 'annotation 1', '-3']),
    'bbox of three numbers': (annotation(bbox=[1, 2, 3]), [TRAIN, 'annotation 1', '[1, 2, 3]']),
    'bbox of five numbers': (annotation(bbox=[1, 2, 3, 4, 5]), [TRAIN, 'annotation 1: bbox']),
    'bbox of texts': (annotation(bbox=['1', '2', '3', '4']), [TRAIN, "bbox ['1', '2', '3', '4']"]),
    'bbox is text': (annotation(bbox='1234'), [TRAIN, "annotation 1: bbox '1234'"]),
    'bbox is an object': (annotation(bbox={'x': 1}), [TRAIN, "annotation 1: bbox {'x': 1}"]),
    'bbox is empty': (annotation(bbox=[]), [TRAIN, 'annotation 1: bbox []']),
    'bbox outside of the image': (
        annotation(bbox=[100, 4, 20, 16]), [TRAIN, 'annotation 1', 'image of 48x40']
    ),
    'bbox above the image': (annotation(bbox=[4, -30, 9, 9]), [TRAIN, 'annotation 1', '48x40']),
    'bbox is huge': (annotation(bbox=[0, 0, 1e30, 4]), [TRAIN, 'annotation 1', '1e+30']),
    'category_id unknown': (
        annotation(category_id=99), [TRAIN, 'annotation 1: category_id 99', '[1, 2, 3]']
    ),
    'category_id unknown in val': (
        edit(lambda content: content['annotations'][1].update(category_id=99), 'val'),
        [VAL, 'annotation 1: category_id 99'],
    ),
    'category_id is text': (annotation(category_id='1'), [TRAIN, "category_id '1'"]),
    'category_id is a list': (annotation(category_id=[1]), [TRAIN, 'category_id [1]']),
    'image_id unknown': (annotation(image_id=77), [TRAIN, 'annotation 1: image_id 77']),
    'image_id is an object': (annotation(image_id={}), [TRAIN, 'annotation 1: image_id {}']),
    'a category is text': (
        edit(lambda content: content['categories'].append('fox')), [TRAIN, "categories has 'fox'"]
    ),
    'category without name': (
        edit(lambda content: content['categories'][1].pop('name')),
        [TRAIN, "categories has {'id': 2}"],
    ),
    'category name is a number': (category(1, name=5), [TRAIN, 'categories has', '5']),
    'category id twice': (category(1, id=1), [TRAIN, "category 1, 'dog', is there twice"]),
    'category name twice': (category(1, name='cat'), [TRAIN, "category 2, 'cat', is there twice"]),
    'category name misspelt': (category(1, name='dgo'), [TRAIN, "'dog'", "nearest is 'dgo'"]),
    'category name in capitals in val': (
        edit(lambda content: content['categories'][2].update(name='owls'), 'val'),
        [VAL, "class 'owl'", "nearest is 'owls'"],
    ),
    'a category less': (
        edit(lambda content: content['categories'].pop()), [TRAIN, "class 'owl'"]
    ),
    'categories in another order': (
        put('categories', BOTH_SWAPPED), [TRAIN, "category 'dog'", "'cat'", 'order']
    ),
    'val without iscrowd': (
        edit(lambda content: content['annotations'][1].pop('iscrowd'), 'val'),
        [VAL, 'annotation 1: has no iscrowd'],
    ),
    'all images too small': (
        edit(lambda content: [i.update(width=31) for i in content['images']]),
        [TRAIN, 'no image is left', 'filter_cfg', '32'],
    ),
    'no image has an object': (put('annotations', []), [TRAIN, 'no image is left', 'filter_cfg']),
    'mask of another size': (
        annotation(segmentation=rle([0, 100], (10, 10))), [TRAIN, 'annotation 1', 'size [10, 10]']
    ),
    'mask without a size': (annotation(segmentation={'counts': [1]}), [TRAIN, 'size None']),
    'mask of garbage counts': (
        annotation(segmentation=rle('garbage counts')), [TRAIN, "counts 'garbage counts'"]
    ),
    'mask of counts without an end': (annotation(segmentation=rle('o' * 50)), [TRAIN, 'counts']),
    'mask of huge counts': (annotation(segmentation=rle('oooo3' * 5)), [TRAIN, 'counts']),
    'mask of empty counts': (annotation(segmentation=rle('')), [TRAIN, "counts ''"]),
    'mask of too few pixels': (annotation(segmentation=rle([100])), [TRAIN, 'counts [100]']),
    'mask of negative counts': (
        annotation(segmentation=rle([-80, 2000])), [TRAIN, 'counts [-80, 2000]']
    ),
    'mask of counts that are text': (annotation(segmentation=rle(['1920'])), [TRAIN, 'counts']),
    'mask is text': (annotation(segmentation='polygon'), [TRAIN, "segmentation 'polygon'"]),
    'mask is empty': (annotation(segmentation=[]), [TRAIN, 'annotation 1: segmentation []']),
    'mask is missing': (annotation(segmentation=None), [TRAIN, 'annotation 1: segmentation None']),
    'polygon of an odd number': (
        annotation(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), [TRAIN, 'annotation 1: segmentation']
    ),
    'polygon of four numbers': (
        annotation(segmentation=[[1, 2, 3, 4]]), [TRAIN, '[1, 2, 3, 4]', 'at least three']
    ),
    'polygon of texts': (
        annotation(segmentation=[['1', '2', '3', '4', '5', '6']]), [TRAIN, "'1'"]
    ),
    'polygon with NaN': (
        annotation(segmentation=[[1, 2, 3, 4, 5, float('nan')]]), [TRAIN, 'nan', 'finite']
    ),
    'polygon far outside': (
        annotation(segmentation=[[1, 2, 1e12, 4, 5, 6]]), [TRAIN, '1000000000000', 'far']
    ),
    'polygon without its list': (
        annotation(segmentation=[8, 4, 28, 4, 28, 20]), [TRAIN, 'segmentation has 8']
    ),
    'metric of a file that is missing': (
        lambda root: coco_file(root, 'val').rename(root / 'annotations' / 'moved.json'), [VAL]
    ),
}  # fmt: skip


def spoil(relative: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / relative).write_bytes(content)


def halve(relative: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        content = (root / relative).read_bytes()
        (root / relative).write_bytes(content[: len(content) // 2])

    return act


def label_map(labels: np.ndarray) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        Image.fromarray(labels).save(root / MAP)

    return act


def flip_bits(relative: str) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        content = bytearray((root / relative).read_bytes())
        for place in range(len(content) // 3, 2 * len(content) // 3):
            content[place] ^= 0x55
        (root / relative).write_bytes(content)

    return act


PICTURE = 'train2017/1.png'
MAP = 'annotations/training/1.png'
PHOTO = 'images/training/1.jpg'
FILLED = np.zeros(SIZE[::-1], np.uint8)

# Name: layout, what is done to the data set, what the message must hold.
BAD_PICTURES = {
    'missing': ('coco', lambda root: (root / PICTURE).unlink(), [PICTURE, 'does not exist']),
    'all missing': ('coco', lambda root: (root / 'train2017').rename(root / 'x'), ['train2017']),
    'empty file': ('coco', spoil(PICTURE, b''), [PICTURE, 'cannot be read']),
    'text': ('coco', spoil(PICTURE, b'not a picture'), [PICTURE, 'cannot be read']),
    'ends early': ('coco', halve(PICTURE), [PICTURE, 'cannot be read']),
    'flipped bits': ('coco', flip_bits(PICTURE), [PICTURE, 'cannot be read']),
    'broken link': (
        'coco', replace(PICTURE, lambda f: f.symlink_to('nothing')), [PICTURE, 'does not exist']
    ),
    'folder': ('coco', replace(PICTURE, Path.mkdir), [PICTURE, 'is no file']),
    'another size': ('coco', replace(PICTURE, lambda f: picture(f, (30, 50))), [PICTURE, '30x50']),
    'turned': ('coco', replace(PICTURE, lambda f: picture(f, SIZE[::-1])), [PICTURE, '40x48']),
    'one pixel wide': (
        'coco', replace(PICTURE, lambda f: picture(f, (1, 40))), [PICTURE, '1x40']
    ),
    'of val missing': (
        'coco', lambda root: (root / 'val2017/0.png').unlink(), ['val2017/0.png', 'not exist']
    ),
    'JPEG that ends early': ('ade', halve(PHOTO), [PHOTO, 'cannot be read']),
    'JPEG empty': ('ade', spoil(PHOTO, b''), [PHOTO, 'cannot be read']),
    'JPEG is text': ('ade', spoil(PHOTO, b'GIF89a'), [PHOTO, 'cannot be read']),
    'label map missing': ('ade', lambda root: (root / MAP).unlink(), [MAP, 'does not exist']),
    'label map of another suffix': (
        'ade', lambda root: (root / MAP).rename(root / MAP.replace('png', 'bmp')), [MAP, '.png']
    ),
    'label map folder missing': (
        'ade', lambda root: (root / 'annotations').rename(root / 'x'), ['annotations/training']
    ),
    'label map empty': ('ade', spoil(MAP, b''), [MAP, 'cannot be read']),
    'label map ends early': ('ade', halve(MAP), [MAP, 'cannot be read']),
    'label map is text': ('ade', spoil(MAP, b'0 1 2'), [MAP, 'cannot be read']),
    'label map is a folder': ('ade', replace(MAP, Path.mkdir), [MAP, 'is no file']),
    'label map of another size': ('ade', label_map(FILLED[:-1]), [MAP, '48x39', '48x40']),
    'label map turned': ('ade', label_map(FILLED.T.copy()), [MAP, '40x48']),
    'label above the classes': ('ade', label_map(FILLED + 3), [MAP, 'label 3', '0 to 2', '255']),
    'label 254': ('ade', label_map(FILLED + 254), [MAP, 'label 254']),
    'label map in colours': (
        'ade', label_map(np.stack([FILLED] * 3, -1)), [MAP, '3 channels', 'one']
    ),
    'label map with opacity': ('ade', label_map(np.stack([FILLED] * 4, -1)), [MAP, '4 channels']),
    'label map of 16 bits': (
        'ade', label_map(FILLED.astype(np.uint16) + 256), [MAP, 'label 256']
    ),
    'images of another suffix': (
        'ade',
        lambda root: [
            f.rename(f.with_suffix('.jpeg')) for f in (root / 'images/training').iterdir()
        ],
        ['images/training', 'img_suffix is .jpg', '3 of .jpeg'],
    ),
    'no images': (
        'ade',
        lambda root: [f.unlink() for f in (root / 'images/training').iterdir()],
        ['images/training', 'no images', 'none'],
    ),
    'class folder empty': (
        'imagenet', lambda root: [f.unlink() for f in (root / 'train/dog').iterdir()],
        ['train/dog', 'holds no images', '.jpg'],
    ),
    'class folder missing': (
        'imagenet', lambda root: (root / 'train/dog').rename(root / 'dog'),
        ['train', '2 folders', '3 classes'],
    ),
    'class folder more': (
        'imagenet', lambda root: picture(root / 'train/fox/0.png'), ['train', '4 folders']
    ),
    'classified picture empty': ('imagenet', spoil('train/dog/1.png', b''), ['train/dog/1.png']),
    'classified picture ends early': ('imagenet', halve('val/cat/1.png'), ['val/cat/1.png']),
    'folders missing': (
        'imagenet', lambda root: (root / 'train').rename(root / 'x'), ['train', 'does not exist']
    ),
}  # fmt: skip

MAKE = {'coco': make_coco, 'ade': make_ade, 'imagenet': make_imagenet}
