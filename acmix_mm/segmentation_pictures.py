"""Pictures of what a segmentor predicts, beside the truth, to be looked at."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
from mmengine.dist import master_only
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

OPACITY = 0.5
LEAST = 320  # pixels of the longer side, below which pictures are enlarged
LINE, GAP = 20, 6  # of the legend, pixels
FONT, SCALE = cv2.FONT_HERSHEY_SIMPLEX, 0.45
BACKGROUND = ('background', '_background_', 'bg')


class SegmentationVisualizer(SegLocalVisualizer):
    """mmseg's ``SegLocalVisualizer``, with its arguments, which draws by :func:`draw_classes`.

    Truth and prediction are beside the picture itself. Of mmseg's arguments of ``add_datasample``,
    ``with_labels`` and ``with_image`` have no effect.
    """

    @master_only
    def add_datasample(
        self,
        name: str,
        image: np.ndarray,
        data_sample: SegDataSample | None = None,
        draw_gt: bool = True,
        draw_pred: bool = True,
        show: bool = False,
        wait_time: float = 0,
        out_file: str | Path | None = None,
        step: int = 0,
        **kwargs,
    ) -> None:
        """Draw an RGB picture with what a sample has, as mmseg's method of this name."""
        wanted = {'truth': (draw_gt, 'gt_sem_seg'), 'prediction': (draw_pred, 'pred_sem_seg')}
        maps = {
            title: data_sample.get(key).cpu().data[0].numpy()
            for title, (draw, key) in wanted.items()
            if draw and data_sample is not None and key in data_sample
        }
        drawn = draw_classes(image, maps, **self.dataset_meta)
        self.set_image(drawn)
        if show:
            self.show(drawn, win_name=name, wait_time=wait_time)
        if out_file is not None:
            mmcv.imwrite(drawn[..., ::-1], str(out_file))
        else:
            self.add_image(name, drawn, step)


def draw_classes(
    image: np.ndarray,
    maps: dict[str, np.ndarray],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    **others: object,
) -> np.ndarray:
    """Label maps over a picture, one beside the other, with a legend below.

    Each class has its colour, half transparent, and a line around it; what is of no class, and a
    class called background, is the picture itself. The legend has the classes that there are, those
    with most pixels first. Small pictures are enlarged, and narrow ones get white beside
    them, as wide as words need.

    Args:
        image (np.ndarray): RGB, (H, W, 3).
        maps (dict[str, np.ndarray]): Labels (H, W) by their titles; with more than one, the picture
            itself is beside them.
        classes (Sequence[str]): Names.
        palette (Sequence[Sequence[int]]): RGB colours.
        others: Of a data set's meta information; no effect.

    Returns:
        np.ndarray: RGB.
    """
    factor = max(1, -(-LEAST // max(image.shape[:2])))
    size = (image.shape[1] * factor, image.shape[0] * factor)
    photo = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)
    colours = np.array(palette, np.uint8)
    shown = [name.lower() not in BACKGROUND for name in classes]
    panels = [titled(photo, 'picture')] if len(maps) > 1 else []
    counts = np.zeros(len(classes), int)
    for title, labels in maps.items():
        labels = cv2.resize(labels.astype(np.int32), size, interpolation=cv2.INTER_NEAREST)
        valid = (labels >= 0) & (labels < len(classes))
        counts += np.bincount(labels[valid], minlength=len(classes))
        panel = overlaid(photo, labels, colours, np.array(shown))
        panels.append(titled(panel, title) if len(maps) > 1 else panel)
    drawn = np.hstack([np.pad(p, ((0, 0), (0, GAP), (0, 0)), constant_values=255) for p in panels])
    drawn = drawn[:, :-GAP] if panels else photo
    names = [i for i in np.argsort(-counts, kind='stable') if counts[i] and shown[i]]
    strip = legend([(classes[i], colours[i]) for i in names], drawn.shape[1])
    return np.vstack([widened(drawn, strip.shape[1]), strip])


def overlaid(
    photo: np.ndarray, labels: np.ndarray, colours: np.ndarray, shown: np.ndarray
) -> np.ndarray:
    """A picture with the classes that are shown in their colours, and white lines around them."""
    labels = np.where((labels >= 0) & (labels < len(shown)), labels, -1)
    of_class = (labels >= 0) & np.append(shown, False)[labels]
    mixed = (1 - OPACITY) * photo + OPACITY * colours[labels.clip(0)]
    drawn = np.where(of_class[..., None], mixed, photo).astype(np.uint8)
    visible = np.where(of_class, labels, -1)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= visible[:, 1:] != visible[:, :-1]
    border[1:] |= visible[1:] != visible[:-1]
    drawn[border] = 255
    return drawn


def titled(panel: np.ndarray, title: str) -> np.ndarray:
    """A panel with its title above."""
    panel = widened(panel, GAP + text_width(title))
    strip = np.full((LINE, panel.shape[1], 3), 255, np.uint8)
    write(strip, title, 2, LINE - GAP)
    return np.vstack([strip, panel])


def legend(entries: list[tuple[str, np.ndarray]], width: int) -> np.ndarray:
    """Names beside squares of their colours, in as many lines as it takes.

    It is ``width`` pixels wide, or as the longest name needs.
    """
    lengths = [LINE + text_width(name) + 2 * GAP for name, _ in entries]
    width = max([width, *(GAP + length for length in lengths)])
    places, x, y = [], GAP, 0
    for (name, colour), needed in zip(entries, lengths, strict=True):
        if x + needed > width and x > GAP:
            x, y = GAP, y + LINE
        places.append((name, colour, x, y))
        x += needed
    strip = np.full((y + LINE + GAP if places else 0, width, 3), 255, np.uint8)
    for name, colour, x, y in places:
        square = (x, y + GAP), (x + LINE - GAP, y + LINE)
        cv2.rectangle(strip, *square, tuple(map(int, colour)), -1)
        cv2.rectangle(strip, *square, (120, 120, 120), 1)
        write(strip, name, x + LINE, y + LINE - 2)
    return strip


def widened(image: np.ndarray, width: int) -> np.ndarray:
    """With white to its right, where it is narrower."""
    missing = max(width - image.shape[1], 0)
    return np.pad(image, ((0, 0), (0, missing), (0, 0)), constant_values=255)


def text_width(text: str) -> int:
    return cv2.getTextSize(text, FONT, SCALE, 1)[0][0]


def write(strip: np.ndarray, text: str, x: int, y: int) -> None:
    """Put black text on a strip."""
    cv2.putText(strip, text, (x, y), FONT, SCALE, (0, 0, 0), 1, cv2.LINE_AA)
