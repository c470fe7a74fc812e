"""What is found in bad data, and that nothing is found in good data."""

import json

import numpy as np
import pytest
from bad_data import (
    BAD_ANNOTATIONS,
    BAD_PICTURES,
    MAKE,
    NAMES,
    SIZE,
    annotation,
    coco_file,
    edit,
    make_ade,
    make_coco,
    make_imagenet,
    picture,
)
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask

from acmix_mm.data_check import _runs, check_data, look_through


def coco_config(root, **filter_cfg) -> Config:
    """Boxes and masks, evaluated, too."""
    pipeline = [
        {'type': 'LoadImageFromFile'},
        {'type': 'LoadAnnotations', 'with_bbox': True, 'with_mask': True},
    ]
    cfg = {'default_scope': 'mmdet'}
    for split in ('train', 'val'):
        file = f'annotations/instances_{split}2017.json'
        dataset = {
            'type': 'CocoDataset', 'data_root': f'{root}/', 'ann_file': file,
            'data_prefix': {'img': f'{split}2017/'}, 'metainfo': {'classes': NAMES},
            'pipeline': pipeline, 'test_mode': split == 'val',
        }  # fmt: skip
        if split == 'train':
            dataset['filter_cfg'] = {'filter_empty_gt': True, 'min_size': 32, **filter_cfg}
        cfg[f'{split}_dataloader'] = {'dataset': dataset}
    metric = {'type': 'CocoMetric', 'metric': ['bbox', 'segm'], 'ann_file': str(root / file)}
    cfg['val_evaluator'] = metric
    return Config(cfg)


def ade_config(root, **settings) -> Config:
    cfg = {'default_scope': 'mmseg'}
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'LoadAnnotations'}]
    for split, folder in (('train', 'training'), ('val', 'validation')):
        prefix = {'img_path': f'images/{folder}', 'seg_map_path': f'annotations/{folder}'}
        dataset = {
            'type': 'BaseSegDataset', 'data_root': str(root), 'data_prefix': prefix,
            'metainfo': {'classes': NAMES}, 'pipeline': pipeline, **settings,
        }  # fmt: skip
        cfg[f'{split}_dataloader'] = {'dataset': dataset}
    return Config(cfg)


def imagenet_config(root, **settings) -> Config:
    cfg = {'default_scope': 'mmpretrain'}
    for split in ('train', 'val'):
        dataset = {
            'type': 'CustomDataset', 'data_root': str(root), 'data_prefix': split,
            'metainfo': {'classes': NAMES}, 'pipeline': [{'type': 'LoadImageFromFile'}], **settings,
        }  # fmt: skip
        cfg[f'{split}_dataloader'] = {'dataset': dataset}
    return Config(cfg)


CONFIGS = {'coco': coco_config, 'ade': ade_config, 'imagenet': imagenet_config}


def message(cfg: Config, **options) -> str:
    """The one line of the check."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011, the tests look at what it says
        check_data(cfg, ['train', 'val'], **options)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def needs_mmpretrain(layout: str) -> None:
    if layout == 'imagenet':
        pytest.importorskip('mmpretrain')


@pytest.mark.parametrize('name', BAD_ANNOTATIONS)
def test_bad_annotations(name, tmp_path):
    make_coco(tmp_path)
    spoil, expected = BAD_ANNOTATIONS[name]
    spoil(tmp_path)
    found = message(coco_config(tmp_path))
    assert all(part in found for part in expected), found


@pytest.mark.parametrize('name', BAD_PICTURES)
def test_bad_pictures(name, tmp_path):
    layout, spoil, expected = BAD_PICTURES[name]
    needs_mmpretrain(layout)
    MAKE[layout](tmp_path)
    spoil(tmp_path)
    found = message(CONFIGS[layout](tmp_path))
    assert all(part in found for part in expected), found


@pytest.mark.parametrize('thorough', [False, True])
@pytest.mark.parametrize('layout', MAKE)
def test_good_data(layout, thorough, tmp_path, capsys):
    needs_mmpretrain(layout)
    MAKE[layout](tmp_path)
    check_data(CONFIGS[layout](tmp_path), ['train', 'val', 'test'], thorough)
    assert capsys.readouterr().out == ''


def warnings(cfg: Config, capsys, **options) -> list[str]:
    check_data(cfg, ['train', 'val'], **options)
    # Packages of others say something when they are imported.
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line != 'Could not import OneDL']


@pytest.mark.parametrize('box', [[8, 4, 0, 16], [8, 4, 20, 0.5], [48, 4, 0.5, 16]])
def test_boxes_without_extent_are_left_out_as_in_coco(box, tmp_path, capsys):
    """COCO itself has some; mmdet leaves them out."""
    make_coco(tmp_path)
    annotation(bbox=box)(tmp_path)
    (line,) = warnings(coco_config(tmp_path), capsys)
    assert line.startswith('warning: ')
    assert 'annotation 1: ' in line
    assert line.endswith('1 in all')


@pytest.mark.parametrize('box', [[-10, 4, 30, 16], [40, 30, 30.5, 20], [0, 0, 48.2, 40.3]])
def test_boxes_may_reach_out_of_their_image(box, tmp_path, capsys):
    make_coco(tmp_path)
    annotation(bbox=box)(tmp_path)
    assert warnings(coco_config(tmp_path), capsys) == []


def test_short_polygons_beside_others_are_left_out_unless_taken_for_boxes(tmp_path, capsys):
    make_coco(tmp_path)
    change = {'segmentation': [[8, 4, 28, 4, 28, 20], [8, 4, 28, 4]]}
    annotation(**change)(tmp_path)
    (line,) = warnings(coco_config(tmp_path), capsys)
    assert '[8, 4, 28, 4]' in line
    edit(lambda content: content['annotations'][1].update(change), 'val')(tmp_path)
    assert len(warnings(coco_config(tmp_path), capsys)) == 2
    change['segmentation'].reverse()
    edit(lambda content: content['annotations'][1].update(change), 'val')(tmp_path)
    assert 'instances_val2017.json: annotation 1' in message(coco_config(tmp_path))


@pytest.mark.parametrize('classes, boxes', [(('cat', 'owl'), 6), (('dog',), 3)])
def test_some_of_the_classes_may_be_chosen(classes, boxes, tmp_path):
    make_coco(tmp_path)
    cfg = coco_config(tmp_path)
    cfg.train_dataloader.dataset.metainfo = {'classes': classes, 'left_out': ('*',)}
    (contents,) = look_through(cfg, ['train'])
    assert not contents.problems
    assert sum(contents.labels.values()) == boxes


def test_masks_are_looked_at_where_they_are_loaded(tmp_path, capsys):
    make_coco(tmp_path)
    annotation(segmentation=[])(tmp_path)
    cfg = coco_config(tmp_path)
    cfg.train_dataloader.dataset.pipeline[1].with_mask = False
    assert warnings(cfg, capsys) == []


def test_images_without_objects_may_be_kept(tmp_path, capsys):
    make_coco(tmp_path)
    edit(lambda content: content['annotations'].clear())(tmp_path)
    assert warnings(coco_config(tmp_path, filter_empty_gt=False), capsys) == []


def test_crowds_are_objects(tmp_path, capsys):
    """mmdet keeps images whose objects are all crowds."""
    make_coco(tmp_path)
    edit(lambda content: [a.update(iscrowd=1) for a in content['annotations']])(tmp_path)
    assert warnings(coco_config(tmp_path), capsys) == []


def test_test_images_have_no_annotations(tmp_path, capsys):
    """As COCO's image_info_test-dev2017.json."""
    make_coco(tmp_path)
    edit(lambda content: content.pop('annotations'), 'val')(tmp_path)
    cfg = coco_config(tmp_path)
    cfg.val_evaluator.update(format_only=True, outfile_prefix='results')
    assert warnings(cfg, capsys) == []


def change_metric_file(root, change) -> Config:
    """The metric's file is another one than the data set's, and changed."""
    make_coco(root)
    cfg = coco_config(root)
    file = coco_file(root, 'val').with_name('metric.json')
    file.write_bytes(coco_file(root, 'val').read_bytes())
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    cfg.val_evaluator.ann_file = str(file)
    return cfg


@pytest.mark.parametrize(
    'change, expected',
    [
        (lambda content: content['images'].pop(), 'image_id 2'),
        (
            lambda content: (
                content['images'].pop(),
                content.update(annotations=content['annotations'][:6]),
            ),
            'has no image 2',
        ),
        (
            lambda content: content['images'].append(dict(content['images'][0], id=9)),
            'also has image 9',
        ),
        (lambda content: content['images'][1].update(width=60), 'image 1 has another size'),
        (lambda content: content['categories'].append({'id': 9, 'name': 'fox'}), 'categories'),
        (lambda content: content['annotations'][0].update(bbox=[1]), 'bbox [1]'),
    ],
)
def test_metrics_file_differs(change, expected, tmp_path):
    found = message(change_metric_file(tmp_path, change))
    assert 'metric.json' in found
    assert expected in found


def test_metrics_file_may_be_a_copy(tmp_path, capsys):
    cfg = change_metric_file(tmp_path, lambda content: content.update(info={}))
    assert warnings(cfg, capsys) == []


def test_metrics_file_is_missing(tmp_path):
    make_coco(tmp_path)
    cfg = coco_config(tmp_path)
    cfg.val_evaluator.ann_file = 'nothing.json'
    found = message(cfg)
    assert 'val_evaluator.ann_file' in found
    assert 'nothing.json' in found


@pytest.mark.parametrize('wrap', [
    lambda inner: {'type': 'RepeatDataset', 'times': 2, 'dataset': inner},
    lambda inner: {'type': 'ClassBalancedDataset', 'oversample_thr': 0.1, 'dataset': inner},
    lambda inner: {'type': 'MultiImageMixDataset', 'pipeline': [], 'dataset': inner},
    lambda inner: {'type': 'ConcatDataset', 'datasets': [inner, inner]},
    lambda inner: {'type': 'RepeatDataset', 'times': 1, 'dataset': {
        'type': 'ConcatDataset', 'datasets': [inner]}},
])  # fmt: skip
def test_wrapped_data_sets(wrap, tmp_path, capsys):
    make_coco(tmp_path)
    cfg = coco_config(tmp_path)
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset)
    assert warnings(cfg, capsys) == []
    annotation(bbox=[1])(tmp_path)
    assert 'bbox [1]' in message(cfg)


def test_repeated_no_times(tmp_path):
    """mmengine's endless sampler would wait for ever."""
    make_coco(tmp_path)
    cfg = coco_config(tmp_path)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = {'type': 'RepeatDataset', 'times': 0, 'dataset': inner}
    assert 'train_dataloader.dataset.times: 0' in message(cfg)


def test_other_types_are_loaded_and_counted(tmp_path):
    file = tmp_path / 'list.json'
    file.write_text(json.dumps({'metainfo': {}, 'data_list': [{'img_path': 'a.jpg'}]}))
    dataset = {'type': 'BaseDetDataset', 'ann_file': str(file), 'data_prefix': {'img_path': ''}}
    cfg = Config({'train_dataloader': {'dataset': dataset}, 'default_scope': 'mmdet'})
    (contents,) = look_through(cfg, ['train'])
    assert contents.images == 1
    assert 'not looked into' in contents.facts['annotations']
    file.write_text(json.dumps({'metainfo': {}, 'data_list': []}))
    assert 'holds no images' in message(cfg)


@pytest.mark.parametrize('labels, allowed', [(3, True), (4, False)])
def test_labels_with_a_zero_that_is_left_out(labels, allowed, tmp_path, capsys):
    """With reduce_zero_label, labels 1 to 3 are the three classes."""
    make_ade(tmp_path)
    filled = np.full(SIZE[::-1], labels, np.uint8)
    Image.fromarray(filled).save(tmp_path / 'annotations/training/1.png')
    cfg = ade_config(tmp_path, reduce_zero_label=True)
    if allowed:
        assert warnings(cfg, capsys) == []
    else:
        assert 'label 4' in message(cfg)
        assert '0 to 3' in message(cfg)


def test_reduced_in_one_place_only(tmp_path):
    make_ade(tmp_path)
    cfg = ade_config(tmp_path)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.pipeline[1].reduce_zero_label = True
    assert 'reduce_zero_label of LoadAnnotations is True' in message(cfg)
    inner = [[{'type': 'LoadAnnotations', 'reduce_zero_label': True}]]
    for split in ('train', 'val'):
        pipeline = [{'type': 'LoadImageFromFile'}, {'type': 'TestTimeAug', 'transforms': inner}]
        cfg[f'{split}_dataloader'].dataset.pipeline = pipeline
    assert 'reduce_zero_label of LoadAnnotations is True' in message(cfg)


def test_masks_of_0_and_255(tmp_path, capsys):
    """Their foreground would be of no class."""
    make_ade(tmp_path)
    for file in tmp_path.glob('annotations/*/*.png'):
        mask = np.zeros(SIZE[::-1], np.uint8)
        mask[:9] = 255
        Image.fromarray(mask).save(file)
    lines = warnings(ade_config(tmp_path), capsys)
    assert len(lines) == 2
    assert "the only labels looked at are of class 'cat' and 255" in lines[0]
    assert '255 is of no class, the classes are 0 to 2' in lines[0]
    Image.fromarray(mask // 255).save(file)  # of the validation data
    assert len(warnings(ade_config(tmp_path), capsys)) == 1


def without_classes(cfg: Config, heads: int) -> Config:
    """A config whose data sets name no classes, of a model with so many."""
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.pop('metainfo')
    cfg.model = {'decode_head': {'num_classes': heads}, 'head': {'num_classes': heads}}
    return cfg


def test_labels_without_names_are_those_of_the_heads(tmp_path, capsys):
    make_ade(tmp_path)
    assert warnings(without_classes(ade_config(tmp_path), 3), capsys) == []
    found = message(without_classes(ade_config(tmp_path), 2))
    assert 'label 2' in found
    assert '0 to 1 for 2 classes' in found


def test_folders_without_names_are_as_many_as_the_heads_classes(tmp_path, capsys):
    pytest.importorskip('mmpretrain')
    make_imagenet(tmp_path)
    assert warnings(without_classes(imagenet_config(tmp_path), 3), capsys) == []
    found = message(without_classes(imagenet_config(tmp_path), 10))
    assert '3 folders' in found
    assert "one for each of the heads' 10 classes" in found


def of_two_classes(root, **metainfo) -> Config:
    cfg = coco_config(root)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.metainfo = {'classes': NAMES[:2], **metainfo}
    return cfg


def test_a_category_that_is_no_class(tmp_path, capsys):
    """mmdet would drop its boxes without a word; the config has to say so."""
    make_coco(tmp_path)
    found = message(of_two_classes(tmp_path))
    assert found.startswith(str(coco_file(tmp_path)))
    assert "category 'owl' has 3 annotations and is no class" in found
    assert "train_dataloader.dataset.metainfo.left_out names it, as ('owl',)" in found
    for patterns in (('owl',), ('*',), ('cow', 'o*')):
        assert warnings(of_two_classes(tmp_path, left_out=patterns), capsys) == []
    assert "category 'owl'" in message(of_two_classes(tmp_path, left_out=('cow',)))


def test_a_category_without_annotations_may_be_no_class(tmp_path, capsys):
    """As the first one of many exports, which stands for all."""
    make_coco(tmp_path)
    for split in ('train', 'val'):
        more = {'id': 9, 'name': 'animals'}
        edit(lambda content, more=more: content['categories'].append(more), split)(tmp_path)
    assert warnings(coco_config(tmp_path), capsys) == []


def test_a_misspelt_category_names_the_nearest(tmp_path):
    make_coco(tmp_path)
    for split in ('train', 'val'):
        edit(lambda content: content['categories'][2].update(name='owls'), split)(tmp_path)
    assert "category 'owls' has 3 annotations and is no class" in message(
        of_two_classes(tmp_path, left_out=())
    )
    found = message(coco_config(tmp_path))
    assert "no category has the name of class 'owl', the nearest is 'owls'" in found


def test_names_in_a_list(tmp_path, capsys):
    make_ade(tmp_path)
    (tmp_path / 'list.txt').write_text('0\n2\n')
    cfg = ade_config(tmp_path, ann_file='list.txt')
    cfg.pop('val_dataloader')
    assert warnings(cfg, capsys) == []
    (tmp_path / 'list.txt').write_text('0\n7\n')
    assert 'images/training/7.jpg' in message(cfg) or 'annotations/training/7.png' in message(cfg)
    (tmp_path / 'list.txt').write_text('')
    assert 'list.txt: names no images' in message(cfg)
    (tmp_path / 'list.txt').write_bytes(b'\xff\xfe')
    assert 'list.txt: is no text' in message(cfg)
    (tmp_path / 'list.txt').unlink()
    assert 'list.txt: does not exist' in message(cfg)


def test_lines_of_a_classification_list(tmp_path, capsys):
    pytest.importorskip('mmpretrain')
    make_imagenet(tmp_path)
    cfg = imagenet_config(tmp_path, ann_file='list.txt')
    cfg.pop('val_dataloader')
    file = tmp_path / 'list.txt'
    file.write_text('cat/0.png 0\nowl/1.png 2\n')
    assert warnings(cfg, capsys) == []
    for line, found in {
        'owl/1.png': "line 2: 'owl/1.png'",
        'owl/1.png owl': "line 2: 'owl/1.png owl'",
        'owl/1.png 3': "line 2: 'owl/1.png 3'",
        'owl/1.png -1': "line 2: 'owl/1.png -1'",
        'owl/9.png 2': 'train/owl/9.png: does not exist',
    }.items():
        file.write_text(f'cat/0.png 0\n{line}\n')
        assert found in message(cfg)
    file.write_text('')
    assert 'list.txt: is empty' in message(cfg)


@pytest.mark.parametrize('mode', ['L', 'P', '1', 'RGBA', 'LA', 'I;16'])
def test_pictures_of_other_modes(mode, tmp_path, capsys):
    """They are loaded as three channels."""
    make_coco(tmp_path)
    file = tmp_path / 'train2017/1.png'
    Image.fromarray(np.zeros(SIZE[::-1], np.uint16)).save(file)
    if mode != 'I;16':
        Image.new(mode, SIZE).save(file)
    assert warnings(coco_config(tmp_path), capsys) == []


def test_cmyk_and_turned_jpegs(tmp_path, capsys):
    """The camera's orientation is applied when a picture is loaded."""
    make_coco(tmp_path)
    Image.new('CMYK', SIZE).save(tmp_path / 'train2017/1.png', format='jpeg')
    assert warnings(coco_config(tmp_path), capsys) == []
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new('RGB', SIZE[::-1]).save(tmp_path / 'train2017/1.png', format='jpeg', exif=exif)
    assert warnings(coco_config(tmp_path), capsys) == []


def test_thorough_opens_all_and_finds_pictures_that_are_there_twice(tmp_path):
    make_coco(tmp_path)

    def add(content: dict) -> None:
        for i in range(10, 60):
            content['images'].append(dict(content['images'][0], id=i, file_name=f'{i}.png'))
            picture(tmp_path / f'train2017/{i}.png', seed=i + 100)

    edit(add)(tmp_path)
    middle = tmp_path / 'train2017/35.png'
    middle.write_bytes(b'')
    (tmp_path / 'val2017/1.png').unlink()
    (tmp_path / 'val2017/0.png').write_bytes((tmp_path / 'train2017/0.png').read_bytes())
    cfg = coco_config(tmp_path)
    (contents,) = look_through(cfg, ['train'])
    assert not contents.problems
    train, val = look_through(cfg, ['train', 'val'], thorough=True)
    (problem,) = train.problems.values()
    assert problem.stops
    assert f'{middle}: cannot be read' in str(problem)
    absent, problem = val.problems.values()
    assert 'val2017/1.png: does not exist' in str(absent)
    assert not problem.stops
    assert 'val2017/0.png: is the same picture as' in str(problem)
    assert 'train2017/0.png' in str(problem)


def test_what_a_data_set_holds(tmp_path):
    make_coco(tmp_path)
    (contents,) = look_through(coco_config(tmp_path), ['train'])
    assert contents.images == 3
    assert contents.labels == {'cat': 3, 'dog': 3, 'owl': 3}
    assert contents.facts['widths'] == '48 to 48'
    assert contents.facts['small objects'] == 9
    make_ade(tmp_path / 'ade')
    (contents,) = look_through(ade_config(tmp_path / 'ade'), ['train'], thorough=True)
    assert contents.images == 3
    assert sum(contents.labels.values()) == 3 * 48 * 40
    assert set(contents.labels) == {*NAMES}


def test_run_lengths_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0.001, 0.02, 0.5, 0.99):
        for height, width in ((1, 1), (40, 48), (700, 900)):
            mask = np.asfortranarray(rng.random((height, width)) < density)
            pixels = np.concatenate([[False], mask.ravel(order='F'), [False]])
            ends = np.flatnonzero(np.diff(pixels.astype(int)))
            expected = np.diff([0, *ends, mask.size]).tolist()
            if expected[-1] == 0:
                expected.pop()
            counts = coco_mask.encode(mask.astype(np.uint8))['counts'].decode()
            assert _runs(counts) == expected


def test_no_run_lengths():
    assert _runs('!') is None
    assert _runs('o') is None
    assert _runs('o' * 100 + '0') is None
    assert _runs('é') is None


def test_label_maps_without_names_of_classes(tmp_path, capsys):
    make_ade(tmp_path)
    assert warnings(ade_config(tmp_path, metainfo={}), capsys) == []
