"""Pictures of segmentors: what is in them, pixel by pixel."""

import numpy as np
import pytest
import test as evaluate  # tools/test.py
import torch
from mmengine.registry import VISUALIZERS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from acmix_mm.segmentation_pictures import GAP, LINE, draw_classes

CLASSES, PALETTE = ('background', 'cat', 'dog'), [[0, 0, 0], [200, 0, 0], [0, 0, 200]]
SIZE = 400  # large enough not to be enlarged


@pytest.fixture
def photo() -> np.ndarray:
    return np.full((SIZE, SIZE, 3), 100, np.uint8)


def labels(value: int) -> np.ndarray:
    """The upper left quarter of a class, the rest background."""
    labels = np.zeros((SIZE, SIZE), int)
    labels[: SIZE // 2, : SIZE // 2] = value
    return labels


def test_one_label_map(photo):
    drawn = draw_classes(photo, {'prediction': labels(1)}, CLASSES, PALETTE)
    assert drawn.shape == (SIZE + LINE + GAP, SIZE, 3)
    assert drawn[50, 50].tolist() == [150, 50, 50]
    assert drawn[SIZE // 2, 50].tolist() == [255, 255, 255]  # the line around
    # Background, with nothing written on it, is the photograph.
    assert (drawn[SIZE // 2 + 1 : SIZE] == 100).all()
    legend = drawn[SIZE:]
    assert (legend == [200, 0, 0]).all(-1).any()
    assert not (legend == [0, 0, 200]).all(-1).any()  # a class that is not there


def test_truth_beside_prediction(photo):
    maps = {'truth': labels(1), 'prediction': labels(2)}
    drawn = draw_classes(photo, maps, CLASSES, PALETTE)
    width = SIZE + GAP
    for column, colour in enumerate(([100] * 3, [150, 50, 50], [50, 50, 150])):
        assert drawn[LINE + 50, column * width + 50].tolist() == colour
        assert (drawn[LINE + SIZE // 2 + 1 : LINE + SIZE, column * width + 10] == 100).all()


@pytest.mark.parametrize('value', [255, 3, -1])
def test_pixels_of_no_class_are_the_photograph(photo, value):
    drawn = draw_classes(photo, {'truth': np.full((SIZE, SIZE), value)}, CLASSES, PALETTE)
    np.testing.assert_array_equal(drawn, photo)


def test_small_pictures_are_enlarged():
    drawn = draw_classes(
        np.zeros((30, 20, 3), np.uint8), {'x': np.ones((30, 20))}, CLASSES, PALETTE
    )
    assert drawn.shape == (330 + LINE + GAP, 220, 3)


def test_long_legends_have_lines(photo):
    classes = [f'a class of the number {i}' for i in range(9)]
    rows = np.repeat(np.arange(9), 50)[:SIZE, None].repeat(SIZE, 1)
    drawn = draw_classes(photo, {'x': rows}, classes, [[10 * i, 0, 0] for i in range(9)])
    assert (drawn.shape[0] - SIZE - GAP) % LINE == 0
    assert drawn.shape[0] > SIZE + 4 * LINE


@pytest.mark.parametrize('titles', [['prediction'], ['truth', 'prediction']])
def test_nothing_written_is_cut_off(photo, titles):
    """On a picture of one column, words are as on a wide one."""
    classes = ['a class of a long name', 'and another one of a name that is longer']
    rows = labels(1)

    def written(columns: int) -> int:
        maps = dict.fromkeys(titles, rows[:, :columns])
        drawn = draw_classes(photo[:, :columns], maps, classes, PALETTE)
        lines = np.vstack([drawn[: LINE - 1] if len(titles) > 1 else drawn[:0], drawn[-60:]])
        return (lines.max(-1) < 50).sum()

    assert written(1) == written(SIZE) > 100


def test_of_mmsegs_hook(photo, tmp_path):
    """Built by its name, and called as mmseg's hook calls it."""
    init_default_scope('mmseg')
    backend = {'type': 'LocalVisBackend'}
    visualizer = VISUALIZERS.build({
        'type': 'SegmentationVisualizer', 'name': 'pictures', 'vis_backends': [backend],
        'save_dir': str(tmp_path),
    })  # fmt: skip
    assert type(visualizer).get_instance('pictures') is visualizer
    visualizer.dataset_meta = {'classes': CLASSES, 'palette': PALETTE, 'reduce_zero_label': False}
    truth, prediction = (PixelData(data=torch.from_numpy(labels(i))[None]) for i in (1, 2))
    sample = SegDataSample(gt_sem_seg=truth, pred_sem_seg=prediction)
    visualizer.add_datasample(
        'test_a.jpg', photo, data_sample=sample, show=False, wait_time=0.0, step=3
    )
    assert visualizer.get_image().shape[1] == 3 * SIZE + 2 * GAP
    assert len(list(tmp_path.glob('**/test_a*.png'))) == 1


def test_in_the_place_of_mmsegs(pytestconfig, tmp_path):
    """A user's config that inherits mmseg's runtime gets these pictures, too."""
    file = tmp_path / 'mine.py'
    file.write_text(
        f"_base_ = '{pytestconfig.rootpath}/configs/demo/acmix-pvt_fpn_scene-digits.py'\n"
        "visualizer = dict(type='SegLocalVisualizer')"
    )
    arguments = [str(file), 'x.pth', '--work-dir', str(tmp_path / 'w'), '--show-dir', 'pictures']
    cfg = evaluate.build_config(evaluate.parse_args(arguments))
    assert cfg.visualizer.type == 'SegmentationVisualizer'
