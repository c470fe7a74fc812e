"""Looks through the data sets of a config for what would stop training, or spoil it silently.

Looked into are the annotations of mmdet's ``CocoDataset``, mmseg's ``BaseSegDataset`` and
mmpretrain's ``CustomDataset`` with their subclasses, also within wrappers; data sets of other types
are loaded and counted.
"""

import difflib
import hashlib
import inspect
import io
import json
import math
import os
import posixpath
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch

import numpy as np
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from PIL import Image
from tqdm import tqdm

from .command_line import in_one_line
from .config_check import head_classes

ENDS = 16  # pictures at each end of a data set that the quick check opens
EXAMPLES = 3  # of each kind of problem that a report shows
ID = (int, str)  # types of ids in annotation files
LAZY = {'lazy_init': True, 'serialize_data': False}
IGNORED = 255  # label of pixels that no loss counts
LAYOUTS = {
    'CocoDataset': 'annotations/instances_{train,val}2017.json, train2017/ and val2017/ for COCO',
    'BaseSegDataset': 'images/{training,validation}/ and annotations/{training,validation}/ for '
    'ADE20K',
    'CustomDataset': 'train/ and val/ with a folder for each class for ImageNet',
}

ANNOTATION_KEYS = {'image_id', 'category_id', 'bbox', 'area'}
BOX = 'bbox is x, y, width and height in pixels, finite, width and height not negative'
IMAGE_SIZE = 'height and width are numbers of pixels, at least 1'
POLYGON = 'polygons have pairs x, y of finite coordinates, at least three, none far outside'
RUNS = 'size is [height, width] of the image, counts are runs that fill it'
READABLE = 'a picture that can be read'


@dataclass
class Problem:
    """One kind of problem in a data set.

    Args:
        allowed (str): What should be.
        stops (bool): Whether it is an error; otherwise training goes on without the item.
        count (int): How often it was found.
        examples (list[str]): The first few, each with its file.
    """

    allowed: str
    stops: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f'{self.examples[0]} ({self.allowed})'


@dataclass
class Contents:
    """What one data set of a config holds, and what is wrong with it.

    Args:
        place (str): Where the config has it, for example ``'train_dataloader.dataset'``.
        kind (str): Its type.
        images (int): How many it has.
        facts (dict[str, object]): What is told of it, by name.
        labels (Counter[str]): Boxes, pixels or images of each class.
        problems (dict[str, Problem]): By what is allowed.
        heads (int | None): Classes of the model's heads, None where they are not known.
    """

    place: str
    kind: str = ''
    images: int = 0
    facts: dict[str, object] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    problems: dict[str, Problem] = field(default_factory=dict)
    heads: int | None = None

    def add(self, file: str, found: str, allowed: str, stops: bool = True) -> None:
        """Note a problem."""
        problem = self.problems.setdefault(allowed, Problem(allowed, stops))
        problem.count += 1
        if problem.count <= EXAMPLES:
            text = f'{file}: {found}'
            # A name may hold line breaks, and what no terminal shows.
            shown = [c if c.isprintable() else repr(c)[1:-1] for c in text]
            problem.examples.append(''.join(shown))

    @property
    def errors(self) -> list[Problem]:
        """The problems that stop training."""
        return [problem for problem in self.problems.values() if problem.stops]


def check_data(cfg: Config, splits: Iterable[str], thorough: bool = False) -> None:
    """Check that the data of a config can be trained and evaluated on.

    What is only left out, such as boxes without an extent, is said in a line each.

    Args:
        cfg (Config): A config for mmengine's Runner.
        splits (Iterable[str]): Of 'train', 'val' and 'test', those to be looked at.
        thorough (bool): Open all pictures and label maps, not only the first and last ones.

    Raises:
        ValueError: In one line, if they cannot.
    """
    for contents in look_through(cfg, splits, thorough):
        for problem in contents.errors:
            raise ValueError(str(problem))
        for problem in contents.problems.values():
            print(f'warning: {problem}, {problem.count} in all')


def look_through(cfg: Config, splits: Iterable[str], thorough: bool = False) -> Iterator[Contents]:
    """Each data set of a config, as :func:`check_data` sees it.

    Args:
        cfg (Config): A config for mmengine's Runner.
        splits (Iterable[str]): Of 'train', 'val' and 'test', those to be looked at.
        thorough (bool): Open all pictures and label maps, with a progress bar, look for those that
            are there twice, and take a data set that does not load for a problem of it.
    """
    pictures: dict[bytes, str] = {}
    heads = {count for _, count in head_classes(cfg.get('model') or {})}
    heads = heads.pop() if len(heads) == 1 else None
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            continue
        metrics = cfg.get(f'{split}_evaluator') if split != 'train' else None
        metrics = metrics if isinstance(metrics, list) else [metrics or {}]
        for place, dataset_cfg in _data_sets(loader['dataset'], f'{split}_dataloader.dataset'):
            contents = Contents(place, str(dataset_cfg.get('type')), heads=heads)
            try:
                dataset = _build(dataset_cfg, cfg.get('default_scope', 'mmdet'))
                _look(dataset, contents, metrics, thorough, pictures)
            except Exception as error:
                if not thorough:
                    raise
                contents.add(place, in_one_line(error), 'a data set that loads')
            yield contents


def _data_sets(dataset_cfg: dict, place: str) -> Iterator[tuple[str, dict]]:
    """The data sets within wrappers, each with its place in the config."""
    if 'datasets' in dataset_cfg:
        for number, inner in enumerate(dataset_cfg['datasets']):
            yield from _data_sets(inner, f'{place}.datasets[{number}]')
    elif 'dataset' in dataset_cfg:
        if dataset_cfg.get('times', 1) < 1:  # mmengine's endless sampler would look for ever
            raise ValueError(f'{place}.times: {dataset_cfg["times"]} (at least 1)')
        yield from _data_sets(dataset_cfg['dataset'], f'{place}.dataset')
    else:
        yield place, dataset_cfg


def _build(dataset_cfg: dict, scope: str):
    """The data set, with nothing loaded yet where its type can do so."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = dataset_cfg['type']
        kind = registry.get(kind) if isinstance(kind, str) else kind
        lazy = inspect.isclass(kind) and issubclass(kind, BaseDataset)
        return registry.build(dict(dataset_cfg, **LAZY) if lazy else dataset_cfg)


def _look(
    dataset,
    contents: Contents,
    metrics: list[dict],
    thorough: bool,
    pictures: dict[bytes, str],
) -> None:
    looks = {
        'CocoDataset': _look_at_coco,
        'BaseSegDataset': _look_at_label_maps,
        'CustomDataset': _look_at_folders,
    }
    kinds = [kind.__name__ for kind in type(dataset).__mro__]
    known = next((kind for kind in kinds if kind in looks and _is_read_like(dataset, kind)), None)
    _check_classes(dataset, contents)
    if known is None:
        contents.facts['annotations'] = 'of a type that is not looked into'
        contents.images = len(dataset)
        if not contents.images:
            contents.add(contents.place, 'holds no images', 'at least one')
    elif _check_places(dataset, contents, known):
        items = looks[known](dataset, contents, metrics, thorough)
        if thorough or not contents.errors:
            _check_pictures(dataset, items, contents, thorough, pictures)
            if known == 'BaseSegDataset':
                _check_spread(dataset, contents)


def _is_read_like(dataset, kind: str) -> bool:
    """Whether it reads annotations with the method of that base class of it."""
    base = next(base for base in type(dataset).__mro__ if base.__name__ == kind)
    return type(dataset).load_data_list is base.load_data_list


def _check_classes(dataset, contents: Contents) -> None:
    """Class names are a list."""
    classes = dataset.metainfo.get('classes')
    if classes is None:
        return
    contents.facts['classes'] = len(classes)
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        found = f'classes {reprlib.repr(classes)}'
        contents.add(f'{contents.place}.metainfo', found, 'a list of names')


def _check_places(dataset, contents: Contents, kind: str) -> bool:
    """Whether the annotation file and folders of a data set are there."""
    root = dataset.data_root or '.'
    advice = (
        f'the data lie below {root} as {LAYOUTS[kind]}; another place is given by '
        f'{contents.place}.data_root, see the README'
    )
    backend_args = getattr(dataset, 'backend_args', None)
    file = dataset.ann_file
    if file or kind == 'CocoDataset':
        if not fileio.exists(file, backend_args=backend_args):
            contents.add(file or f'{contents.place}.ann_file', 'does not exist', advice)
        elif not fileio.isfile(file, backend_args=backend_args):
            contents.add(file, 'is no file', 'an annotation file')
    for prefix in dataset.data_prefix.values():
        if prefix and not fileio.isdir(prefix, backend_args=backend_args):
            exists = fileio.exists(prefix, backend_args=backend_args)
            found = 'is no folder' if exists else 'does not exist'
            contents.add(prefix, found, advice)
    return not contents.errors


# COCO's annotation files


@dataclass(frozen=True)
class _Use:
    """What an annotation file is used for.

    Args:
        classes (Sequence[str]): The data set's.
        left_out (Sequence[str]): Patterns of the categories that the config leaves out knowingly.
        prefix (str): Folder of the pictures.
        masks (bool): Whether masks are loaded or evaluated.
        labelled (bool): Whether annotations are needed.
        evaluated (bool): Whether a metric reads them.
        thorough (bool): Whether there is time for a progress bar.
    """

    classes: Sequence[str]
    left_out: Sequence[str]
    prefix: str
    masks: bool
    labelled: bool
    evaluated: bool
    thorough: bool


@dataclass
class _Coco:
    """What is used of an annotation file, by the ids of images and categories.

    Args:
        sizes (dict): Widths and heights of images.
        files (dict): Their names.
        categories (dict): Names of categories.
        with_objects (set): Ids of the images with objects of the data set's classes.
    """

    sizes: dict[int | str, tuple[int, int]] = field(default_factory=dict)
    files: dict[int | str, str] = field(default_factory=dict)
    categories: dict[int | str, str] = field(default_factory=dict)
    with_objects: set[int | str] = field(default_factory=set)


def _look_at_coco(
    dataset, contents: Contents, metrics: list[dict], thorough: bool
) -> list[tuple[str, tuple[int, int]]]:
    """Check a COCO data set without its pictures, which are returned with their sizes."""
    metrics = [metric for metric in metrics if metric.get('type') == 'CocoMetric']
    labelled = not any(metric.get('format_only') for metric in metrics)
    use = _Use(
        classes=dataset.metainfo['classes'],
        left_out=dataset.metainfo.get('left_out', ()),
        prefix=dataset.data_prefix.get('img', ''),
        masks=any(getattr(step, 'with_mask', False) for step in dataset.pipeline.transforms)
        or any('segm' in metric.get('metric', 'bbox') for metric in metrics),
        labelled=labelled,
        evaluated=bool(metrics) and labelled,
        thorough=thorough,
    )

    def read(file: str, contents: Contents) -> _Coco:
        content = _read_json(file, dataset.backend_args, contents)
        return _Coco() if contents.errors else _check_coco(file, content, use, contents)

    coco = read(dataset.ann_file, contents)
    for metric in metrics:
        file = metric.get('ann_file')
        if file and not contents.errors and not _same_file(file, dataset.ann_file):
            if not fileio.isfile(file):
                name = contents.place.partition('_')[0]
                contents.add(f'{name}_evaluator.ann_file', f'{file} is no file', dataset.ann_file)
                continue
            other = read(file, Contents(contents.place, problems=contents.problems))
            if not contents.errors:
                _compare(dataset, coco, other, file, contents)
    if contents.errors:
        return []
    sizes = list(coco.sizes.values())
    contents.images = len(sizes)
    contents.facts['images without objects'] = len(sizes) - len(coco.with_objects)
    for name, values in zip(('widths', 'heights'), zip(*sizes, strict=True), strict=True):
        contents.facts[name] = f'{min(values)} to {max(values)}'
    _check_filter(dataset, coco, contents)
    return [(os.path.join(use.prefix, coco.files[i]), size) for i, size in coco.sizes.items()]


def _same_file(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _read_json(file: str, backend_args: dict | None, contents: Contents):
    try:
        text = fileio.get_text(file, backend_args=backend_args)
    except (OSError, UnicodeDecodeError) as error:
        found = f'cannot be read: {in_one_line(error)}'
        contents.add(file, found, "annotations in COCO's format")
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = f'is no JSON: {in_one_line(error)}' if text.strip() else 'is empty'
        contents.add(file, found, "annotations in COCO's format")
        return None


def _check_coco(file: str, content, use: _Use, contents: Contents) -> _Coco:
    """Check what an annotation file holds; ends early where the rest depends on it."""
    coco = _Coco()
    if not isinstance(content, dict):
        found = f'top level is {type(content).__name__}'
        contents.add(file, found, 'an object with the lists images, annotations and categories')
        return coco
    for key in ('images', 'categories', *(['annotations'] if use.labelled else [])):
        if key not in content:
            contents.add(file, f'has no key {key}', 'keys are images, annotations and categories')
        elif not isinstance(content[key], list):
            found = f'{key} is {type(content[key]).__name__}'
            contents.add(file, found, 'images, annotations and categories are lists')
    if contents.errors:
        return coco
    if not content['images']:
        contents.add(file, 'images is empty', 'at least one image')
    _check_categories(file, content['categories'], use.classes, coco, contents)
    _check_images(file, content['images'], use.prefix, coco, contents)
    if contents.errors:
        return coco
    seen, chosen = set(), {*use.classes}
    annotations = content.get('annotations') or []
    for annotation in tqdm(annotations, 'annotations', disable=not use.thorough, leave=False):
        if not isinstance(annotation, dict):
            found = f'annotations has {reprlib.repr(annotation)}'
            contents.add(file, found, 'annotations are objects')
            continue
        number = annotation.get('id')
        for found, allowed, stops in _faults(annotation, coco, use):
            contents.add(file, f'annotation {number}: {found}', allowed, stops)
        if not isinstance(number, ID):
            contents.add(file, f'annotation has id {reprlib.repr(number)}', 'id is a number')
        elif number in seen:
            contents.add(file, f'annotation {number} is there twice', 'each id once')
        seen.add(str(number) if isinstance(number, list | dict) else number)
        _count(annotation, coco, chosen, contents)
    _check_left_out(file, annotations, use, coco, contents)
    return coco


def _check_left_out(
    file: str, annotations: list[dict], use: _Use, coco: _Coco, contents: Contents
) -> None:
    """mmdet leaves out, without a word, annotations of categories that are no classes."""
    if contents.errors:
        return
    counts = Counter(coco.categories[a['category_id']] for a in annotations)
    for name, count in counts.items():
        if name not in use.classes and not any(fnmatch(name, p) for p in use.left_out):
            near = difflib.get_close_matches(name, use.classes, 1)
            near = f', the nearest is {near[0]!r}' if near else ''
            place = f'{contents.place}.metainfo'
            contents.add(
                file,
                f'category {name!r} has {count} annotations and is no class{near}',
                f"{place}.classes has each category, or {place}.left_out names it, as ('{name}',); "
                "('*',) leaves out all others",
            )


def _check_categories(
    file: str, categories: list, classes: Sequence[str], coco: _Coco, contents: Contents
) -> None:
    """mmdet numbers classes by the order of the file's categories that have their names."""
    for category in categories:
        number, name = (
            (category.get('id'), category.get('name')) if isinstance(category, dict) else (0, 0)
        )
        if not isinstance(number, ID) or not isinstance(name, str):
            found = f'categories has {reprlib.repr(category)}'
            contents.add(file, found, 'categories are objects with id and name')
        elif number in coco.categories or name in coco.categories.values():
            found = f'category {number}, {name!r}, is there twice'
            contents.add(file, found, 'each id and name once')
        else:
            coco.categories[number] = name
    if len({*classes}) < len(classes):
        found = f'classes {reprlib.repr(classes)}'
        contents.add(f'{contents.place}.metainfo', found, 'each name once')
    if contents.errors:
        return
    names = [name for name in coco.categories.values() if name in classes]
    for name in classes:
        if name not in names:
            near = difflib.get_close_matches(name, coco.categories.values(), 1)
            near = f', the nearest is {near[0]!r}' if near else ''
            count = len(coco.categories)
            found = f'no category has the name of class {name!r}{near}'
            listed = reprlib.repr([*coco.categories.values()])
            allowed = f'{contents.place}.metainfo.classes are of its {count} categories, {listed}'
            contents.add(file, found, allowed)
    if not contents.errors and names != list(classes):
        at = next(i for i, (a, b) in enumerate(zip(names, classes, strict=True)) if a != b)
        found = f'category {names[at]!r} stands where the classes have {classes[at]!r}'
        place = f'{contents.place}.metainfo.classes'
        contents.add(file, found, f"{place} are in the file's order, by which mmdet numbers them")


def _check_images(file: str, images: list, prefix: str, coco: _Coco, contents: Contents) -> None:
    names: dict[str, object] = {}
    for place, image in enumerate(images):
        if not isinstance(image, dict):
            found = f'images[{place}] is {reprlib.repr(image)}'
            contents.add(file, found, 'images are objects')
            continue
        number = image.get('id')
        missing = [key for key in ('id', 'file_name', 'height', 'width') if key not in image]
        if missing:
            named = f'images[{place}]' if 'id' in missing else f'image {number}'
            allowed = 'images have id, file_name, height and width'
            contents.add(file, f'{named} has no {missing[0]}', allowed)
            continue
        name, width, height = (image[key] for key in ('file_name', 'width', 'height'))
        if not isinstance(number, ID):
            found = f'images[{place}] has id {reprlib.repr(number)}'
            contents.add(file, found, 'id is a number')
        elif number in coco.sizes:
            contents.add(file, f'image {number} is there twice', 'each id once')
        elif not _finite([width, height]) or min(width, height) < 1:
            found = f'image {number}: height {height!r}, width {width!r}'
            contents.add(file, found, IMAGE_SIZE)
        elif not isinstance(name, str) or not name:
            contents.add(file, f'image {number}: file_name {name!r}', 'name of a file')
        elif prefix and (name.startswith('/') or posixpath.normpath(name).startswith('..')):
            found = f'image {number}: file_name {name!r}'
            contents.add(file, found, f'a file below {prefix}')
        else:
            coco.sizes[number] = (width, height)
            coco.files[number] = name
            if name in names:
                found = f'image {number}: {name} is image {names[name]}, too'
                contents.add(file, found, 'each picture once', stops=False)
            names[name] = number


def _finite(values) -> bool:
    """Whether all values are finite numbers."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _faults(annotation: dict, coco: _Coco, use: _Use) -> Iterator[tuple[str, str, bool]]:
    """What is wrong with an annotation, what is allowed, and whether training stops at it."""
    missing = ANNOTATION_KEYS - annotation.keys()
    if missing:
        allowed = 'annotations have image_id, category_id, bbox and area'
        yield f'has no {min(missing)}', allowed, True
        return
    image, category = annotation['image_id'], annotation['category_id']
    if use.evaluated and 'iscrowd' not in annotation:
        yield 'has no iscrowd', 'what COCO metrics evaluate has iscrowd, 0 or 1', True
    if not isinstance(image, ID) or image not in coco.sizes:
        found = f'image_id {reprlib.repr(image)}'
        yield found, 'id of one of the images', True
        return
    if not isinstance(category, ID) or category not in coco.categories:
        found = f'category_id {reprlib.repr(category)}'
        yield found, f'one of {reprlib.repr([*coco.categories])}', True
    if not _finite([annotation['area']]):
        yield f'area {annotation["area"]!r}', 'a finite number of pixels', True
        return
    width, height = coco.sizes[image]
    box = annotation['bbox']
    if not isinstance(box, list) or len(box) != 4 or not _finite(box) or min(box[2:]) < 0:
        yield f'bbox {reprlib.repr(box)}', BOX, True
        return
    x, y, w, h = box
    # Boxes reach out of images by rounding, as in COCO, or where their objects do.
    inside = x + w >= -1 and x <= width + 1 and y + h >= -1 and y <= height + 1
    if not inside or x < -width or y < -height or x + w > 2 * width or y + h > 2 * height:
        found = f'bbox {box} in an image of {width}x{height} pixels'
        yield found, 'boxes lie in the image, or reach at most its size beyond it', True
    elif min(w, h) < 1 or annotation['area'] <= 0:
        found = f'bbox {box}, area {annotation["area"]}'
        yield found, 'boxes of less than 1 pixel or without area are left out', False
    if use.masks:
        mask = annotation.get('segmentation')
        yield from _mask_faults(mask, width, height, use.evaluated)


def _mask_faults(mask, width: int, height: int, evaluated: bool) -> Iterator[tuple[str, str, bool]]:
    if not mask:
        yield f'segmentation {mask!r}', 'a mask for each object, polygons or run lengths', True
    elif isinstance(mask, dict):
        size, counts = mask.get('size'), mask.get('counts')
        runs = _runs(counts) if isinstance(counts, str) else counts
        if size != [height, width]:
            found = f'segmentation has size {reprlib.repr(size)}'
            yield f'{found} in an image of height {height} and width {width}', RUNS, True
        elif (
            not isinstance(runs, list)
            or not _finite(runs)
            or min(runs, default=0) < 0
            or sum(runs) != width * height
        ):
            yield f'segmentation has counts {reprlib.repr(counts)}', RUNS, True
    elif not isinstance(mask, list):
        yield f'segmentation {reprlib.repr(mask)}', 'polygons or run lengths', True
    else:
        bad = [p for p in mask if not _is_polygon(p, width, height)]
        # mmdet leaves out those of too few numbers next to others; pycocotools takes the first of
        # a mask for a box.
        few = len(bad) < len(mask) and all(
            isinstance(p, list) and (len(p) < 6 or len(p) % 2) and _finite(p) for p in bad
        )
        stops = not few or (evaluated and not _is_polygon(mask[0], width, height))
        if bad:
            allowed = POLYGON if stops else 'short or odd polygons next to others are left out'
            yield f'segmentation has {reprlib.repr(bad[0])}', allowed, stops


def _is_polygon(polygon, width: int, height: int) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and _finite(polygon)
        and max(polygon) <= 2 * max(width, height)
        and min(polygon) >= -max(width, height)
    )


def _runs(counts: str) -> list[int] | None:
    """Run lengths from COCO's text, None if it is no such text.

    Each is written in groups of five bits from the lowest on, with a sixth bit if more follow and
    48 added to be a printable character; from the fourth on, as the difference to the last but one.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # negative
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return None if shift else runs


def _count(annotation: dict, coco: _Coco, classes: set[str], contents: Contents) -> None:
    if contents.problems and contents.errors:
        return
    name = coco.categories[annotation['category_id']]
    if name in classes:
        coco.with_objects.add(annotation['image_id'])
        contents.labels[name] += 1
        area = annotation['area']
        size = 'small' if area < 32**2 else 'medium' if area < 96**2 else 'large'
        contents.facts[f'{size} objects'] = contents.facts.get(f'{size} objects', 0) + 1
        if annotation.get('iscrowd'):
            contents.facts['crowds'] = contents.facts.get('crowds', 0) + 1


def _compare(dataset, coco: _Coco, other: _Coco, file: str, contents: Contents) -> None:
    """Check that a metric's annotation file is of the same images as the data set's."""
    allowed = f'the same images as {dataset.ann_file}'
    whole = getattr(dataset, '_indices', None) is None
    for number in coco.sizes.keys() ^ other.sizes.keys() if whole else ():
        found = 'has no image' if number in coco.sizes else 'also has image'
        contents.add(file, f'{found} {number}', allowed)
    for number, size in coco.sizes.items():
        if size != other.sizes.get(number, size):
            found = f'image {number} has another size, {other.sizes[number]}'
            contents.add(file, found, allowed)
    if coco.categories != other.categories:
        contents.add(file, 'has other categories', allowed)


def _check_filter(dataset, coco: _Coco, contents: Contents) -> None:
    """Some images are left where the data set leaves out empty and small ones."""
    rule = dataset.filter_cfg or {}
    if dataset.test_mode or not rule:
        return
    least = rule.get('min_size', 0)
    kept = [number for number, size in coco.sizes.items() if min(size) >= least]
    if rule.get('filter_empty_gt'):
        kept = [number for number in kept if number in coco.with_objects]
    contents.facts['images left'] = len(kept)
    if not kept:
        found = 'no image is left for training'
        allowed = f'{contents.place}.filter_cfg: with an object unless filter_empty_gt is False'
        contents.add(dataset.ann_file, found, f'{allowed}, height and width at least {least}')


# Segmentation


def _look_at_label_maps(
    dataset, contents: Contents, metrics: list[dict], thorough: bool
) -> list[tuple[str, str | None]]:
    """Check a segmentation data set's files; pictures are returned with their label maps."""
    folder = dataset.data_prefix['img_path']
    for step in _steps(dataset.pipeline.transforms):
        reduce = getattr(step, 'reduce_zero_label', None)
        if reduce not in (None, dataset.reduce_zero_label):
            found = f'reduce_zero_label of {type(step).__name__} is {reduce}'
            allowed = f"left out, it is the data set's, {dataset.reduce_zero_label}"
            contents.add(f'{contents.place}.pipeline', found, allowed)
    try:
        infos = dataset.load_data_list()
    except UnicodeDecodeError as error:
        contents.add(dataset.ann_file, f'is no text: {error}', 'a name on each line')
        return []
    items = [(info['img_path'], info.get('seg_map_path')) for info in infos]
    contents.images = len(items)
    if not items:
        if dataset.ann_file:
            contents.add(dataset.ann_file, 'names no images', 'a name on each line')
        else:
            names = fileio.list_dir_or_file(
                folder, list_dir=False, recursive=True, backend_args=dataset.backend_args
            )
            suffixes = Counter(posixpath.splitext(name)[1] for name in names)
            found = ', '.join(f'{count} of {suffix}' for suffix, count in suffixes.most_common(3))
            allowed = f'{contents.place}.img_suffix is {dataset.img_suffix}'
            contents.add(folder, f'no images among its files: {found or "none"}', allowed)
    maps = [label_map for _, label_map in items if label_map is not None]
    allowed = f'a label map for each image, with the suffix {dataset.seg_map_suffix}'
    missing = _check_files(maps, allowed, dataset.backend_args, contents)
    return [item for item in items if item[1] not in missing]


def _steps(transforms: Iterable) -> Iterator:
    """Transforms, with those within others, as in test-time augmentation."""
    for step in transforms:
        yield step
        for inner in ('transforms', 'subroutines'):
            within = getattr(step, inner, None)
            yield from _steps(within if isinstance(within, (list, tuple)) else ())


def _look_at_map(file: str, size: tuple[int, int], dataset, contents: Contents) -> None:
    """Check one label map, whose image has a size of (width, height)."""
    # Those of the files, of which the config may choose some.
    classes = (dataset.METAINFO if dataset.label_map else dataset.metainfo).get('classes')
    classes = classes or range(contents.heads or IGNORED)
    count = len(classes)
    try:
        labels = np.asarray(_open(file, dataset.backend_args)[0])
    except Exception as error:
        contents.add(file, _damage(error), 'a label map that can be read')
        return
    if labels.ndim != 2:
        contents.add(file, f'has {labels.shape[-1]} channels', 'a label map has one')
        return
    if labels.shape[::-1] != size:
        found = '{}x{} pixels, of an image of {}x{}'.format(*labels.shape[::-1], *size)
        contents.add(file, found, 'a label map has the size of its image')
        return
    reduced = bool(dataset.reduce_zero_label)
    found, pixels = np.unique(labels, return_counts=True)
    for label, number in zip(found.tolist(), pixels.tolist(), strict=True):
        if label != IGNORED and not 0 <= label < count + reduced:
            shift = ' and reduce_zero_label' if reduced else ''
            allowed = f'0 to {count + reduced - 1} for {count} classes{shift}, or {IGNORED}'
            contents.add(file, f'label {label} at {number} pixels', allowed)
            return
        left_out = label == IGNORED or label < reduced
        contents.labels['ignored' if left_out else str(classes[label - reduced])] += number


def _check_spread(dataset, contents: Contents) -> None:
    """Masks whose foreground is 255 leave one class to train on."""
    found = [name for name in contents.labels if name != 'ignored']
    classes = dataset.metainfo.get('classes') or ()
    left_out = contents.labels['ignored'] and not dataset.reduce_zero_label
    if left_out and len(found) == 1 < len(classes):
        contents.add(
            dataset.data_prefix['seg_map_path'],
            f'the only labels looked at are of class {found[0]!r} and {IGNORED}',
            f'{IGNORED} is of no class, the classes are 0 to {len(classes) - 1}',
            stops=False,
        )


# Classification


def _look_at_folders(
    dataset, contents: Contents, metrics: list[dict], thorough: bool
) -> list[tuple[str, None]]:
    """Check a classification data set's files; pictures are returned."""
    classes = dataset.metainfo.get('classes')
    folder = dataset.img_prefix
    if dataset.with_label and not dataset.ann_file:
        names = sorted(fileio.list_dir_or_file(folder, list_file=False))
        count = contents.heads if classes is None else len(classes)
        if count is not None and len(names) != count:
            found = f'{len(names)} folders, {reprlib.repr(names)}'
            of = "the heads'" if classes is None else 'the'
            contents.add(folder, found, f'one for each of {of} {count} classes')
        for name in names:
            files = fileio.list_dir_or_file(
                fileio.join_path(folder, name), list_dir=False, recursive=True
            )
            if not any(dataset.is_valid_file(file) for file in files):
                allowed = f'a class has images, {", ".join(sorted(dataset.extensions))}'
                contents.add(f'{folder}/{name}', 'holds no images', allowed)
    elif dataset.ann_file:
        try:
            lines = fileio.list_from_file(dataset.ann_file)
        except UnicodeDecodeError as error:
            contents.add(dataset.ann_file, f'is no text: {error}', 'an image on each line')
            return []
        most = len(classes) if classes else contents.heads or sys.maxsize
        for number, line in enumerate(lines, 1) if dataset.with_label else ():
            label = line.strip().rpartition(' ')[2]
            if ' ' not in line.strip() or not label.isdecimal() or int(label) >= most:
                found = f'line {number}: {reprlib.repr(line)}'
                contents.add(dataset.ann_file, found, f'image and label, 0 to {most - 1}')
        if not lines:
            contents.add(dataset.ann_file, 'is empty', 'an image on each line')
    if contents.errors:
        return []
    items = dataset.load_data_list()
    contents.images = len(items)
    for item in items:
        if 'gt_label' in item:
            label = item['gt_label']
            contents.labels[classes[label] if classes else f'class {label}'] += 1
    return [(item['img_path'], None) for item in items]


# Pictures


def _check_files(
    files: Iterable[str], allowed: str, backend_args: dict | None, contents: Contents
) -> set[str]:
    """Check that files exist, by the listings of their folders; returns those that do not."""
    listed: dict[str, set[str]] = {}
    missing = set()
    for file in files:
        folder, _, name = file.rpartition('/')
        if folder not in listed:
            is_folder = fileio.isdir(folder or '.', backend_args=backend_args)
            listed[folder] = {
                *fileio.list_dir_or_file(
                    folder or '.', list_dir=False, backend_args=backend_args
                )
            } if is_folder else set()  # fmt: skip
        # Listings leave out hidden files.
        if name not in listed[folder] and not fileio.isfile(file, backend_args=backend_args):
            exists = fileio.exists(file, backend_args=backend_args)
            contents.add(file, 'is no file' if exists else 'does not exist', allowed)
            missing.add(file)
    return missing


def _check_pictures(
    dataset,
    items: list[tuple[str, object]],
    contents: Contents,
    thorough: bool,
    seen: dict[bytes, str],
) -> None:
    """Check that all pictures exist and that those at the ends, or all, can be read.

    Args:
        items: Each picture with what it should fit: its size (width, height), or its label map.
        seen: Digests of pictures with their files, for those that are there twice.
    """
    backend_args = getattr(dataset, 'backend_args', None)
    missing = _check_files([file for file, _ in items], 'an image', backend_args, contents)
    items = [item for item in items if item[0] not in missing]
    load = next(
        (t for t in dataset.pipeline.transforms if type(t).__name__ == 'LoadImageFromFile'), None
    )
    chosen = items if thorough or len(items) <= 2 * ENDS else items[:ENDS] + items[-ENDS:]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda item: _read(item[0], load, backend_args), chosen)
        pairs = zip(chosen, results, strict=True)
        bar = tqdm(pairs, 'pictures', len(chosen), disable=not thorough, leave=False)
        for (file, expected), (size, digest, fault) in bar:
            if fault is not None:
                contents.add(file, fault, READABLE)
            elif isinstance(expected, tuple) and size != expected:
                found = '{}x{} pixels, and the annotations say {}x{}'.format(*size, *expected)
                contents.add(file, found, 'width and height of the picture')
            elif isinstance(expected, str):
                _look_at_map(expected, size, dataset, contents)
            if thorough and fault is None and not _same_file(seen.setdefault(digest, file), file):
                found = f'is the same picture as {seen[digest]}'
                contents.add(file, found, 'each picture once, and in one split', stops=False)


def _open(file: str, backend_args: dict | None) -> tuple[Image.Image, bytes]:
    """A picture, decoded, and its file's bytes."""
    content = fileio.get(file, backend_args=backend_args)
    image = Image.open(io.BytesIO(content))
    image.load()
    return image, content


def _read(
    file: str, load: Callable[[dict], dict] | None, backend_args: dict | None
) -> tuple[tuple[int, int], bytes, str | None]:
    """Size (width, height), digest and damage of a picture, with the loader of the data set.

    That loader takes a file that ends early for a picture; Pillow does not.
    """
    try:
        image, content = _open(file, backend_args)
        digest = hashlib.blake2b(content).digest()
        if load is None:
            return image.size, digest, None
        height, width = load({'img_path': file})['ori_shape']
        return (width, height), digest, None
    except Exception as error:
        return (0, 0), b'', _damage(error)


def _damage(error: Exception) -> str:
    return f'cannot be read: {in_one_line(error)}'
