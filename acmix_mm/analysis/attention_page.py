"""One page of HTML in which attention weights can be explored; it needs nothing else."""

import base64
import io
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from ..files import write_whole
from .attention import Attention
from .attention_figures import EITHER_SIGN, POSITIVE
from .images import Frame

BUDGET = 6 * 2**20  # bytes of weights in a page, a third more as text
LONGEST_SIDE = 1400  # of the image in a page
LARGE = 2**18  # values of an image that is stored with losses


def steps_of(attentions: Sequence[Attention], budget: int = BUDGET) -> list[int]:
    """How many positions of a layer's map one stored position stands for, along each axis.

    1 for all where the weights of all positions take ``budget`` bytes at most; otherwise the step
    of the largest layer is doubled until they do.
    """
    steps = [1] * len(attentions)

    def size(index: int) -> int:
        attention, step = attentions[index], steps[index]
        rows, cols = (-(-side // step) for side in attention.query_size)
        return rows * cols * attention.groups * (math.prod(attention.grid) + 4)

    while sum(map(size, range(len(steps)))) > budget:
        largest = max(range(len(steps)), key=size)
        if size(largest) == size_of_one(attentions[largest]):
            break
        steps[largest] *= 2
    return steps


def size_of_one(attention: Attention) -> int:
    """Bytes of the weights of one position."""
    return attention.groups * (math.prod(attention.grid) + 4)


def stored_queries(attention: Attention, step: int) -> Tensor:
    """Positions (P, 2) of the map of queries whose weights are stored, row by row."""
    rows, cols = (
        (torch.arange(0, side, step) + step // 2).clamp(max=side - 1)
        for side in attention.query_size
    )
    return torch.stack(torch.meshgrid(rows, cols, indexing='ij'), -1).flatten(0, 1)


def quantised(weights: Tensor, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights (..., K) in steps of 1 / 255 of the largest, or of 1 / 127 with a sign.

    Returns:
        tuple[np.ndarray, np.ndarray]: The steps, uint8 (..., K), negative ones as two's complement,
        and the largest absolute value of each row, float32 (...).
    """
    largest = weights.abs().amax(-1).float()
    steps = weights / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    steps = (steps * (127 if signed else 255)).round()
    steps = steps.to(torch.int8 if signed else torch.uint8)
    return steps.numpy(force=True).view(np.uint8), largest.numpy(force=True)


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _uri(kind: str, content: bytes) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'


def _layer(attention: Attention, step: int) -> dict:
    queries = stored_queries(attention, step)
    parts = [
        quantised(attention.weights(chunk), attention.signed)
        for chunk in queries.split(max(1, 2**24 // (4 * size_of_one(attention))))
    ]
    steps, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    rows, cols = attention.query_size
    plural = 's' if attention.groups > 1 else ''
    return {
        'name': attention.name,
        'kind': attention.kind,
        'text': f'{rows} x {cols}, {attention.groups} {attention.group_name}{plural}',
        'groupName': attention.group_name,
        'groups': attention.groups,
        'signed': attention.signed,
        'size': attention.size,
        'queries': attention.query_size,
        'grid': attention.grid,
        'keySize': attention.key_size,
        'step': step,
        'geometry': attention.geometry,
        'weights': _text(steps),
        'scales': _text(scales.astype('<f4')),
    }


def _picture(image: np.ndarray) -> str:
    """The image as a URI, with losses where it is large."""
    picture, content = Image.fromarray(image), io.BytesIO()
    kind = 'png' if image.size < LARGE else 'jpeg'
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    picture.save(content, kind, quality=90)
    return _uri(kind, content.getvalue())


def write_page(
    attentions: Sequence[Attention],
    image: np.ndarray,
    frame: Frame,
    point: tuple[int, int],
    title: str,
    of_layers: int,
    figures: Sequence[tuple[str, str, Path]],
    file: str | Path,
) -> None:
    """Write the page.

    Weights are rounded to 1 / 255 of the largest of their position and head; of large maps, every
    second, fourth, ... row and column of positions is left out, see :func:`steps_of`, and the page
    says so.

    Args:
        attentions (Sequence[Attention]): Of the layers to choose from, the first is shown first.
        image (np.ndarray): RGB, (H, W, 3).
        frame (Frame): Where it lies in the network's input.
        point (tuple[int, int]): Pixel (x, y) that is shown first.
        title (str): Heading of the page.
        of_layers (int): How many layers the model has, to be said in the page.
        figures (Sequence[tuple[str, str, Path]]): Heading, explanation and PNG file of each figure
            below.
        file (str | Path): The page.
    """
    tables = {'positive': colormaps[POSITIVE], 'signed': colormaps[EITHER_SIGN]}
    count = len(attentions)
    content = {
        'title': title,
        'extent': f'{count} of the {of_layers} mixed operators with attention'
        + (' (--layers chooses others).' if count < of_layers else '.'),
        'image': _picture(image),
        'height': image.shape[0],
        'width': image.shape[1],
        'frame': {name: getattr(frame, name) for name in ('visible', 'input', 'scale', 'origin')},
        'point': point,
        'colours': {
            name: _text((table(np.arange(256))[:, :3] * 255).round().astype(np.uint8))
            for name, table in tables.items()
        },
        'layers': [_layer(a, s) for a, s in zip(attentions, steps_of(attentions), strict=True)],
        'figures': [
            {'title': heading, 'text': text, 'source': _uri('png', drawn.read_bytes())}
            for heading, text, drawn in figures
        ],
    }
    template = files(__package__).joinpath('attention_page.html').read_text(encoding='utf-8')
    # A name in it must not end the script.
    data = json.dumps(content, separators=(',', ':')).replace('<', '\\u003c')
    write_whole(file, template.replace('__DATA__', data))
