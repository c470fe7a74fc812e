"""Images of one's own as the test pipeline of a config gives them to its model."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image, UnidentifiedImageError
from torch import nn


def check_image(image: Path) -> None:
    """Raises an error that says why, unless an image can be read to its end.

    OpenCV, by which pipelines read, takes what there is of one that ends early.
    """
    if not image.is_file():
        raise ValueError('is a folder' if image.is_dir() else 'is no file, or a link to none')
    if not image.stat().st_size:
        raise ValueError('the file is empty')
    try:
        with Image.open(image) as picture:
            picture.load()
    except (UnidentifiedImageError, Image.DecompressionBombError):  # OpenCV may still read it
        if mmcv.imread(image) is None:
            raise ValueError('is no picture') from None


def check_readable(file: Path) -> None:
    """Raises a ValueError that names the image unless it can be read."""
    try:
        check_image(file)
    except Exception as error:  # of PIL, of many kinds
        why = ' '.join(str(getattr(error, 'strerror', None) or error).split())
        raise ValueError(f'image {file} cannot be read: {why}') from None


def read_rgb(file: Path) -> np.ndarray:
    """The image of a file, (H, W, 3), in the orientation that pipelines give it.

    Raises:
        ValueError: If it cannot be read.
    """
    check_readable(file)
    return mmcv.imread(file, channel_order='rgb')


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the input of a network.

    Coordinates are continuous: pixel (x, y) covers x to x + 1 and y to y + 1.

    Args:
        image (tuple[int, int]): Height and width of the image in its file.
        visible (tuple[float, float]): Height and width of what the network sees of it, in pixels of
            the input.
        input (tuple[int, int]): Height and width of the network's input, with padding at the
            bottom and at the right.
        scale (tuple[float, float]): Pixels of the input for one of the image, down and across.
        origin (tuple[float, float]): Pixels cut off at the top and at the left after scaling.
    """

    image: tuple[int, int]
    visible: tuple[float, float]
    input: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    origin: tuple[float, float] = (0.0, 0.0)

    def to_input(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates (x, y) of the input from those of the image."""
        return x * self.scale[1] - self.origin[1], y * self.scale[0] - self.origin[0]

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        """Coordinates (x, y) of the image from those of the input."""
        return (x + self.origin[1]) / self.scale[1], (y + self.origin[0]) / self.scale[0]

    def cell(self, x: int, y: int, size: tuple[int, int]) -> tuple[int, int]:
        """Row and column of a map of that size (height, width) which stand for pixel (x, y).

        A position of the map stands for its share of the input. Where a network rounds sizes up or
        down, that is so but for a part of a position.

        Raises:
            ValueError: If the pixel is not in the image, or if the network does not see it.
        """
        height, width = self.image
        if not (0 <= x < width and 0 <= y < height):
            raise ValueError(
                f'point {x},{y} must be in the image, x from 0 to {width - 1} and y from 0 to '
                f'{height - 1}'
            )
        across, down = self.to_input(x + 0.5, y + 0.5)
        if not (0 <= across < self.visible[1] and 0 <= down < self.visible[0]):
            # Pixels whose centres are in it.
            (left, top), (right, bottom) = (
                (math.ceil(edge - 0.5) for edge in self.to_image(*corner))
                for corner in ((0, 0), self.visible[::-1])
            )
            raise ValueError(
                f'point {x},{y} must be in what the test pipeline leaves of the image, x from '
                f'{left} to {right - 1} and y from {top} to {bottom - 1}'
            )
        row, col = int(down * size[0] / self.input[0]), int(across * size[1] / self.input[1])
        return min(row, size[0] - 1), min(col, size[1] - 1)


class ImageLoader:
    """Loads images by the test pipeline of a config, for its model.

    Args:
        cfg (Config): With ``test_dataloader.dataset.pipeline``. Its parts that load annotations are
            left out.
        model (nn.Module): The config's model, of which only the preprocessor is used.

    Raises:
        ValueError: If the config has no such pipeline.
    """

    def __init__(self, cfg: Config, model: nn.Module):
        init_default_scope(cfg.get('default_scope', 'mmdet'))
        dataset = cfg.get('test_dataloader', {}).get('dataset', {})
        while 'dataset' in dataset:  # wrappers
            dataset = dataset['dataset']
        if not dataset.get('pipeline'):
            raise ValueError('config must have test_dataloader.dataset.pipeline, and has none')
        self.transforms = [
            (name, TRANSFORMS.build(transform))
            for transform in dataset['pipeline']
            for name in [_name(transform)]
            if 'Image' in name or not name.startswith('Load')
        ]
        self.model = model

    def load(self, file: Path) -> tuple[dict, Frame]:
        """An image as a batch for ``model.test_step``, and where it lies in the network's input.

        Raises:
            ValueError: If the image cannot be read, if the model sees it in several pieces, or if
                the pipeline does more to positions than to scale, to crop centrally and to pad.
        """
        check_readable(file)
        if (getattr(self.model, 'test_cfg', None) or {}).get('mode') == 'slide':
            raise ValueError(
                "model.test_cfg.mode must be 'whole', as the positions of sliding windows are not "
                "those of the image, got 'slide'"
            )
        results = {'img_path': str(file), 'img_id': 0, 'sample_idx': 0, 'seg_fields': []}
        frame = None
        for name, transform in self.transforms:
            results = transform(results)
            if results.get('flip'):
                raise ValueError('test pipeline must not flip images')
            if 'img' in results:  # not yet packed
                size = results['img'].shape[:2]
                frame = (
                    Frame(size, size, size) if frame is None else _followed_by(frame, name, size)
                )
        if frame is None:
            raise ValueError('test pipeline must load an image, and loads none')
        data = pseudo_collate([results])
        size = tuple(self.model.data_preprocessor(data, False)['inputs'].shape[-2:])
        return data, replace(frame, input=size)


def _name(transform: dict) -> str:
    kind = transform['type']
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def _followed_by(frame: Frame, name: str, size: tuple[int, int]) -> Frame:
    """The frame after a transform that leaves an image of that size."""
    before = frame.input
    if size == before:
        return frame
    frame = replace(frame, input=size)
    if name == 'Pad':
        return frame
    if name == 'CenterCrop':
        cut = [max(0, round((b - s) / 2)) for b, s in zip(before, size, strict=True)]
        origin = tuple(o + c for o, c in zip(frame.origin, cut, strict=True))
        return replace(frame, origin=origin, visible=size)
    if 'Resize' in name and 'Crop' not in name:
        factors = [s / b for s, b in zip(size, before, strict=True)]
        scale, origin, visible = (
            tuple(v * f for v, f in zip(values, factors, strict=True))
            for values in (frame.scale, frame.origin, frame.visible)
        )
        return replace(frame, scale=scale, origin=origin, visible=visible)
    raise ValueError(
        'test pipeline must only scale, crop centrally or pad images, for their positions to be '
        f'known; {name} changes {before} to {size}'
    )
