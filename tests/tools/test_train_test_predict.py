"""The programs, through Runner, loaders, metrics and checkpoints, on a very small real data set."""

import importlib.util
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import predict
import pytest
import test as evaluate  # tools/test.py
import torch
import train
from PIL import Image
from processes import run_two_processes
from programs import program, scalars

from acmix_mm.engine import use_bfloat16
from acmix_mm.ops import available_backends
from acmix_mm.runs import augment

PROGRAMS = {'train': train, 'test': evaluate, 'predict': predict}
CONFIG = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
NARROW = [
    'model.backbone.base_channels=8',
    'model.neck.in_channels=[32,64,128,256]',
    'model.test_cfg.score_thr=0.0',  # hardly trained, it is sure of nothing
    'default_hooks.logger.interval=1',
    'train_cfg.max_epochs=2',
    'train_cfg.val_interval=2',
]
SEGMENTOR = 'configs/demo/acmix-swin_upernet_scene-digits.py'
ONE_EPOCH = [
    'default_hooks.logger.interval=1',
    'train_cfg.max_epochs=1',
    'train_cfg.val_interval=1',
]


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason='mixed precision is on the GPU')


@pytest.fixture(scope='module')
def options(digits_options):
    return ['--cfg-options', *digits_options, *NARROW]


@pytest.fixture(scope='module')
def run(options, tmp_path_factory):
    """Work directory of two epochs of three iterations, evaluated at the end."""
    work_dir = tmp_path_factory.mktemp('run')
    said = program('train', CONFIG, '--work-dir', str(work_dir), *options)
    (work_dir / 'said.txt').write_text(said)
    return work_dir


def test_train_logs_saves_and_evaluates(run):
    rows = scalars(run)
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)
    assert any('coco/bbox_mAP_50' in row for row in rows)
    for epoch in (1, 2):
        checkpoint = torch.load(run / f'epoch_{epoch}.pth', weights_only=False)
        assert checkpoint['meta']['dataset_meta']['classes'] == tuple('0123456789')


def test_summary(run):
    """At the end, on the terminal and in the work directory."""
    said, page = (run / 'said.txt').read_text(), (run / 'summary.md').read_text()
    assert page in said
    assert f'summary:    {run}/summary.md' in said
    trained = next(row for row in scalars(run) if 'coco/bbox_mAP' in row)
    (row,) = [line for line in page.splitlines() if line.startswith('| coco/bbox_mAP ')]
    assert float(row.split('|')[2]) == pytest.approx(trained['coco/bbox_mAP'], rel=1e-3)
    assert '12 images to train, 4 to validate, 10 classes' in page
    assert '2 epochs of 3 iterations of 4 images' in page
    assert f'{run}/epoch_2.pth' in page
    assert f'python tools/train.py {CONFIG} --work-dir {run}' in page
    assert Image.open(run / 'summary.png').size[0] > 1000


def test_training_changes_every_weight(run):
    first, second = (
        torch.load(run / f'epoch_{epoch}.pth', weights_only=False)['state_dict'] for epoch in (1, 2)
    )
    same = [k for k in first if k.endswith(('weight', 'bias', 'rate1', 'rate2'))
            and torch.equal(first[k], second[k])]  # fmt: skip
    assert not same


@pytest.mark.parametrize('how', [pytest.param('checkpoint', marks=pytest.mark.slow), 'auto'])
def test_resume_equals_uninterrupted(run, options, tmp_path, how):
    """From the checkpoint after epoch 1, the second epoch has the same losses and weights."""
    resume = ['--resume', str(run / 'epoch_1.pth')]
    if how == 'auto':
        (tmp_path / 'epoch_1.pth').write_bytes((run / 'epoch_1.pth').read_bytes())
        (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
        resume = ['--resume']
    program('train', CONFIG, *resume, '--work-dir', str(tmp_path), *options)
    expected = [row['loss'] for row in scalars(run) if 'loss' in row][3:]
    resumed = [row['loss'] for row in scalars(tmp_path) if 'loss' in row]
    assert resumed == expected
    ours, theirs = (
        torch.load(folder / 'epoch_2.pth', weights_only=False)['state_dict']
        for folder in (tmp_path, run)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.slow
def test_auto_scale_lr(options, tmp_path):
    """Batches of 4 at a base of 8 train at half of the configured rate."""
    arguments = [CONFIG, '--work-dir', str(tmp_path), *options]
    configured = train.build_config(train.parse_args(arguments)).optim_wrapper.optimizer.lr
    program(
        'train', *arguments, 'auto_scale_lr.base_batch_size=8', 'param_scheduler=None',
        'train_cfg.max_epochs=1', '--auto-scale-lr',
    )  # fmt: skip
    rates = [row['lr'] for row in scalars(tmp_path) if 'loss' in row]
    assert rates == pytest.approx([configured / 2] * 3)


def test_amp(options):
    """The config it makes; on a CPU it becomes another."""
    cfg = train.build_config(train.parse_args([CONFIG, '--amp', *options]))
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == 'dynamic'
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert use_bfloat16(cfg)
    assert cfg.optim_wrapper.type == 'CPUAmpOptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper
    assert not use_bfloat16(cfg)


@pytest.mark.slow
@no_gpu
def test_amp_on_a_cpu(run, options, tmp_path):
    """Losses near those without, rounded; weights stay float32."""
    said = program(
        'train', CONFIG, '--amp', '--work-dir', str(tmp_path), *options, 'train_cfg.max_epochs=1',
    )  # fmt: skip
    assert 'mixed precision on a CPU: forward passes in bfloat16, no loss scale' in said
    ours, theirs = ([row['loss'] for row in scalars(d) if 'loss' in row] for d in (tmp_path, run))
    assert ours == pytest.approx(theirs[:3], rel=0.05)
    assert ours != theirs[:3]
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert all(t.dtype != torch.bfloat16 for t in saved['state_dict'].values())
    assert 'loss_scaler' not in saved['optimizer']


@no_gpu
def test_amp_on_a_cpu_is_bfloat16(options, tmp_path):
    with pytest.raises(SystemExit, match=r"optim_wrapper\.dtype must be 'bfloat16' on a CPU, got"):
        train.main(
            [CONFIG, '--amp', '--work-dir', str(tmp_path), *options, 'optim_wrapper.dtype=float16']
        )
    assert not list(tmp_path.glob('*.pth'))


def test_auto_scale_lr_needs_a_base(options):
    with pytest.raises(SystemExit, match=r'has no auto_scale_lr\.base_batch_size'):
        train.build_config(train.parse_args([CONFIG, '--auto-scale-lr', *options]))


def test_evaluate(run, options, tmp_path):
    out = tmp_path / 'predictions.pkl'
    said = program(
        'test', CONFIG, str(run / 'epoch_2.pth'), '--work-dir', str(tmp_path), '--out', str(out),
        '--show-dir', 'pictures', *options,
    )  # fmt: skip
    trained = next(row for row in scalars(run) if 'coco/bbox_mAP' in row)
    (file,) = tmp_path.glob('*/*.json')
    assert json.loads(file.read_text())['coco/bbox_mAP'] == trained['coco/bbox_mAP']
    assert len(pickle.loads(out.read_bytes())) == 4
    assert len(list(tmp_path.glob('*/pictures/*.jpg'))) == 4
    assert f'predictions: {out}' in said


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='two processes of a machine without a GPU')
def test_two_processes(options, pytestconfig, tmp_path):
    """Training and evaluation, over gloo."""
    tools, work = pytestconfig.rootpath / 'tools', tmp_path / 'work'
    common = ['--launcher', 'pytorch', '--work-dir', work, *options]
    run_two_processes(tools / 'train.py', CONFIG, *common)
    rows = scalars(work)
    assert len([row for row in rows if 'loss' in row]) == 4  # 12 images, 8 a step
    run_two_processes(tools / 'test.py', CONFIG, work / 'epoch_2.pth', *common)
    metrics = [json.loads(file.read_text()) for file in work.glob('*/*.json')]
    (trained,) = [row for row in rows if 'coco/bbox_mAP' in row]
    assert [m['coco/bbox_mAP'] for m in metrics] == [trained['coco/bbox_mAP']]


@pytest.mark.slow
def test_backends_train_alike(options, tmp_path):
    """The losses of 50 iterations and more, with the same seed, differ by rounding only."""
    losses = {}
    for backend in available_backends():
        if backend != 'triton' or torch.cuda.is_available():  # interpreted, it takes hours
            work_dir = tmp_path / backend
            changes = [
                f'model.backbone.backend={backend}',
                'train_cfg.max_epochs=17',
                'train_cfg.val_interval=17',
            ]
            program('train', CONFIG, '--work-dir', str(work_dir), *options, *changes)
            losses[backend] = [row['loss'] for row in scalars(work_dir) if 'loss' in row]
    expected = losses.pop('torch')
    assert len(expected) == 51
    assert losses
    for name, others in losses.items():
        assert others == pytest.approx(expected, rel=1e-3), name


class TestPredict:
    def predict(self, source, checkpoint, out, options, *more):
        predict.main([str(source), CONFIG, str(checkpoint), '--out-dir', str(out), *more, *options])
        return json.loads((out / 'predictions.json').read_text())

    def test_folder(self, run, options, scene_digits, tmp_path, capsys):
        folder = scene_digits / 'coco' / 'val2017'
        entries = self.predict(
            folder, run / 'epoch_2.pth', tmp_path, options,
            '--score-thr', '0', '--limit', '3', '--device', 'cpu',
        )  # fmt: skip
        names = [entry['image'] for entry in entries]
        assert names == [f'{i:012d}.jpg' for i in (1, 2, 3)]
        assert sorted(p.name for p in (tmp_path / 'vis').iterdir()) == names
        rows = [row for entry in entries for row in entry['predictions']]
        assert rows
        for row in rows:
            assert row['category'] == str(row['label'])
            assert 0 <= row['score'] <= 1
            assert all(-1 <= corner <= 97 for corner in row['bbox'])
        assert str(tmp_path / 'predictions.json') in capsys.readouterr().out

    def test_image_of_another_size(self, run, options, tmp_path):
        picture = np.random.default_rng(0).integers(0, 256, (57, 101, 3), np.uint8)
        Image.fromarray(picture).save(tmp_path / 'noise.png')
        entries = self.predict(
            tmp_path / 'noise.png', run / 'epoch_2.pth', tmp_path / 'out', options
        )
        assert [entry['image'] for entry in entries] == ['noise.png']

    def test_missing_input_and_empty_folder(self, run, options, tmp_path):
        for source, message in ((tmp_path / 'none', 'does not exist'), (tmp_path, 'at least 1,')):
            with pytest.raises(SystemExit, match=message):
                self.predict(source, run / 'epoch_2.pth', tmp_path / 'out', options)

    def test_images_that_cannot_be_read(self, run, options, scene_digits, tmp_path, capfd):
        """They are reported, and the others predicted, each with a picture of its own."""
        folder, out = tmp_path / 'in', tmp_path / 'out'
        picture = Image.open(scene_digits / 'coco' / 'val2017' / '000000000001.jpg')
        (folder / 'c.jpg').mkdir(parents=True)
        for name in ('a.jpg', 'a.png', 'd.jpg'):
            picture.save(folder / name)
        (folder / 'b.jpg').write_bytes((folder / 'a.jpg').read_bytes()[:900])
        with pytest.raises(SystemExit) as stop:
            self.predict(folder, run / 'epoch_2.pth', out, options, '--batch-size', '5')
        file = out / 'predictions.json'
        assert stop.value.code == (
            f'error: 2 of 5 images could not be predicted: b.jpg, c.jpg; {file} says why'
        )
        entries = {entry['image']: entry for entry in json.loads(file.read_text())}
        assert list(entries) == ['a.jpg', 'a.png', 'b.jpg', 'c.jpg', 'd.jpg']
        assert 'truncated' in entries['b.jpg']['error']
        assert entries['c.jpg']['error'] == 'is a folder'
        assert 'c.jpg: is a folder' in capfd.readouterr().err
        pictures = [entry['picture'] for entry in entries.values() if 'picture' in entry]
        assert pictures == ['vis/a.jpg', 'vis/a.png', 'vis/d.jpg']
        with pytest.raises(SystemExit, match='would overwrite the images that are in it'):
            self.predict(out / 'vis', run / 'epoch_2.pth', out, options)

    def test_checkpoint_of_another_model(self, run, options, scene_digits, tmp_path):
        with pytest.raises(SystemExit, match=r'does not fit config .* weights are missing'):
            self.predict(
                scene_digits / 'coco' / 'val2017', run / 'epoch_2.pth', tmp_path,
                [*options, 'model.backbone.depth=38'],
            )  # fmt: skip

    def test_wrong_score(self, capsys):
        with pytest.raises(SystemExit):
            predict.parse_args(['x.jpg', CONFIG, 'x.pth', '--out-dir', 'x', '--score-thr', '2'])
        assert '--score-thr must be between 0 and 1, got 2' in capsys.readouterr().err


CASCADE = """
_base_ = [
    '{configs}/_base_/models/{model}.py',
    '{configs}/_base_/datasets/scene_digits_instance.py',
    '{configs}/_base_/schedules/schedule_demo.py',
    '{configs}/_base_/demo_runtime.py',
]
model = dict(
    backbone=dict(type='ACmixResNet', depth=26, base_channels=8),
    neck=dict(in_channels=[32, 64, 128, 256]),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20)),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(max_per_img=4, score_thr=0.0)),
)
"""


@pytest.mark.parametrize(
    'head',
    [
        pytest.param('mask-rcnn', marks=pytest.mark.slow),
        pytest.param('cascade-rcnn', marks=pytest.mark.slow),
        pytest.param('cascade-mask-rcnn', marks=pytest.mark.slow),
    ],
)
def test_two_stage_detectors(head, digits_options, pytestconfig, tmp_path):
    """Three iterations and an evaluation of boxes, and of masks where there are any."""
    config, metric = 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py', 'segm'
    classes = []
    if head != 'mask-rcnn':
        config = tmp_path / f'{head}.py'
        base = CASCADE.format(configs=pytestconfig.rootpath / 'configs', model=f'{head}_fpn')
        if head == 'cascade-rcnn':
            base, metric = base.replace('_instance', '_detection'), 'bbox'
        config.write_text(base)
        classes = [f'model.roi_head.bbox_head.{stage}.num_classes=10' for stage in range(3)]
        if head == 'cascade-mask-rcnn':
            classes.append('model.roi_head.mask_head.num_classes=10')
    program(
        'train', str(config), '--work-dir', str(tmp_path), '--cfg-options', *digits_options,
        *ONE_EPOCH, *classes, 'model.test_cfg.rcnn.score_thr=0.0',
    )  # fmt: skip
    rows = scalars(tmp_path)
    losses = [row['loss'] for row in rows if 'loss' in row]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    (metrics,) = [row for row in rows if 'loss' not in row]
    assert 0 <= metrics[f'coco/{metric}_mAP_50'] <= 1


@pytest.fixture(scope='module')
def segmentor_options(label_map_options):
    return ['--cfg-options', *label_map_options, *ONE_EPOCH]


@pytest.fixture(scope='module')
def segmentor_run(segmentor_options, tmp_path_factory):
    """Work directory of three iterations of UperNet, evaluated at the end."""
    work_dir = tmp_path_factory.mktemp('segmentor')
    program('train', SEGMENTOR, '--work-dir', str(work_dir), *segmentor_options)
    return work_dir


class TestSegmentor:
    def evaluate(self, run, work_dir, *more) -> dict:
        """Metrics of the trained UperNet."""
        checkpoint = str(run / 'epoch_1.pth')
        program('test', SEGMENTOR, checkpoint, '--work-dir', str(work_dir), *more)
        (file,) = work_dir.glob('*/*.json')
        return json.loads(file.read_text())

    def test_semantic_fpn(self, segmentor_options, tmp_path):
        config = 'configs/demo/acmix-pvt_fpn_scene-digits.py'
        program('train', config, '--work-dir', str(tmp_path), *segmentor_options)
        rows = scalars(tmp_path)
        losses = [row['loss'] for row in rows if 'loss' in row]
        assert len(losses) == 3
        assert all(math.isfinite(loss) for loss in losses)
        assert any('mIoU' in row for row in rows)

    @pytest.mark.slow
    def test_whole_image(self, segmentor_run, segmentor_options, tmp_path):
        metrics = self.evaluate(
            segmentor_run, tmp_path, '--show-dir', 'pictures', *segmentor_options
        )
        trained = next(row for row in scalars(segmentor_run) if 'mIoU' in row)
        assert metrics['mIoU'] == trained['mIoU']
        assert len(list(tmp_path.glob('*/pictures/*.png'))) == 4

    @pytest.mark.parametrize('more', [[], pytest.param(['--tta'], marks=pytest.mark.slow)])
    def test_out(self, segmentor_run, segmentor_options, scene_digits, tmp_path, more):
        """A label map an image, in the data set's numbering, of the size of the image."""
        out = tmp_path / 'maps'
        metrics = self.evaluate(
            segmentor_run, tmp_path, '--out', str(out), *more, *segmentor_options
        )
        truth = scene_digits / 'ade' / 'annotations' / 'validation'
        assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in truth.iterdir())
        pairs = [[np.asarray(Image.open(f / p.name)) for f in (out, truth)] for p in out.iterdir()]
        equal = np.mean([p == t for p, t in pairs])
        assert 100 * equal == pytest.approx(metrics['aAcc'], abs=0.01)

    @pytest.mark.slow
    def test_sliding_window(self, segmentor_run, segmentor_options, tmp_path):
        """One window over the image is the whole image; smaller windows are not."""
        slide = 'model.test_cfg.mode=slide'
        whole, small = (
            self.evaluate(
                segmentor_run, tmp_path / side, *segmentor_options, slide,
                f'model.test_cfg.crop_size=({side},{side})',
                f'model.test_cfg.stride=({side},{side})',
            )
            for side in ('96', '48')
        )  # fmt: skip
        trained = next(row for row in scalars(segmentor_run) if 'mIoU' in row)
        assert whole['aAcc'] == trained['aAcc']
        assert small['aAcc'] != trained['aAcc']

    @pytest.mark.slow
    def test_tta(self, segmentor_run, segmentor_options, tmp_path):
        """With one scale only it changes nothing; with the config's three it does."""
        config = tmp_path / 'one_scale.py'
        config.write_text(
            f"_base_ = '{Path(SEGMENTOR).resolve()}'\n"
            'tta_pipeline = [_base_.tta_pipeline[0], dict(_base_.tta_pipeline[1], transforms=[\n'
            "    [dict(type='Resize', scale_factor=1.0)], *_base_.tta_pipeline[1].transforms[1:]])]"
        )
        checkpoint = str(segmentor_run / 'epoch_1.pth')
        metrics = {}
        for name in (str(config), SEGMENTOR):
            work_dir = tmp_path / Path(name).stem
            options = ['--tta', '--work-dir', str(work_dir), *segmentor_options]
            program('test', name, checkpoint, *options)
            (file,) = work_dir.glob('*/*.json')
            metrics[name] = json.loads(file.read_text())['aAcc']
        trained = next(row for row in scalars(segmentor_run) if 'mIoU' in row)
        assert metrics[str(config)] == trained['aAcc'] != metrics[SEGMENTOR]

    def test_predict(self, segmentor_run, segmentor_options, scene_digits, tmp_path, capsys):
        folder = scene_digits / 'ade' / 'images' / 'validation'
        arguments = [
            str(folder), SEGMENTOR, str(segmentor_run / 'epoch_1.pth'), '--limit', '3',
            '--device', 'cpu',
        ]  # fmt: skip
        maps = []
        for size in ('1', '2'):
            out = tmp_path / size
            predict.main(
                [*arguments, '--out-dir', str(out), '--batch-size', size, *segmentor_options]
            )
            entries = json.loads((out / 'predictions.json').read_text())
            names = [entry['image'] for entry in entries]
            assert names == [f'{i:012d}.jpg' for i in (1, 2, 3)]
            assert sorted(p.name for p in (out / 'vis').iterdir()) == names
            maps.append([np.asarray(Image.open(out / e['label_map'])) for e in entries])
            for entry, label_map in zip(entries, maps[-1], strict=True):
                assert label_map.shape == (96, 96)
                labels, counts = np.unique(label_map, return_counts=True)
                classes = ['background', *'0123456789']
                expected = {classes[i]: n / 96**2 for i, n in zip(labels, counts, strict=True)}
                assert entry['shares'] == pytest.approx(expected)
            assert str(out / 'label_maps') in capsys.readouterr().out
        np.testing.assert_array_equal(*maps)

    def test_predict_sizes(self, segmentor_run, segmentor_options, tmp_path):
        """Images of two sizes are predicted at their own size, in one batch too."""
        rng = np.random.default_rng(0)
        for name, size in (('a', (57, 101)), ('b', (64, 64))):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(
                tmp_path / f'{name}.png'
            )
        predict.main([
            str(tmp_path), SEGMENTOR, str(segmentor_run / 'epoch_1.pth'),
            '--out-dir', str(tmp_path / 'out'), '--batch-size', '2', *segmentor_options,
        ])  # fmt: skip
        maps = [Image.open(tmp_path / 'out' / 'label_maps' / f'{name}.png') for name in 'ab']
        assert [m.size for m in maps] == [(101, 57), (64, 64)]


def test_detector_tta(run, options, pytestconfig, tmp_path):
    """One scale without mirroring changes nothing."""
    config = tmp_path / 'tta.py'
    config.write_text(f"""
_base_ = '{pytestconfig.rootpath / CONFIG}'
tta_model = dict(
    type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=1.0), max_per_img=100)
)
pack = dict(
    _base_.test_pipeline[-1],
    meta_keys=(*_base_.test_pipeline[-1].meta_keys, 'flip', 'flip_direction'),
)
tta_pipeline = [
    _base_.test_pipeline[0],
    dict(
        type='TestTimeAug',
        transforms=[
            [_base_.test_pipeline[1]],
            [dict(type='RandomFlip', prob=0.0)],
            [_base_.test_pipeline[2]],
            [pack],
        ],
    ),
]
""")
    checkpoint, work = str(run / 'epoch_2.pth'), tmp_path / 'work'
    program('test', str(config), checkpoint, '--tta', '--work-dir', str(work), *options)
    (file,) = work.glob('*/*.json')
    trained = next(row for row in scalars(run) if 'coco/bbox_mAP' in row)
    assert json.loads(file.read_text())['coco/bbox_mAP'] == trained['coco/bbox_mAP']


@pytest.mark.slow
def test_detector_tta_by_default(run, options, pytestconfig, tmp_path):
    """As mmdet's: the image and its mirror image, at the size of the test pipeline."""
    config = tmp_path / 'tta.py'
    config.write_text(f"""
_base_ = '{pytestconfig.rootpath / CONFIG}'
tta_model = dict(
    type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
)
flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
tta_pipeline = [
    *_base_.test_pipeline[:2],
    dict(type='TestTimeAug', transforms=[flips, [dict(type='PackDetInputs')]]),
]
""")
    checkpoint, boxes = str(run / 'epoch_2.pth'), {}
    for name, file in (('default', CONFIG), ('written', str(config))):
        out = tmp_path / f'{name}.pkl'
        arguments = ['--tta', '--work-dir', str(tmp_path / name), '--out', str(out), *options]
        program('test', file, checkpoint, *arguments)
        samples = pickle.loads(out.read_bytes())
        boxes[name] = [sample['pred_instances']['bboxes'] for sample in samples]
        assert not any(sample['flip'] for sample in samples)
    torch.testing.assert_close(boxes['default'], boxes['written'], rtol=0, atol=0)


def test_tta_of_a_detector_with_masks(digits_options):
    """mmdet merges boxes only: there is no mask branch, and boxes are evaluated."""
    config = 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py'
    arguments = [config, 'x.pth', '--tta', '--cfg-options', *digits_options]
    args = evaluate.parse_args(arguments)
    cfg = evaluate.build_config(args)
    augment(cfg)
    assert not {'mask_head', 'mask_roi_extractor'} & set(cfg.model.module.roi_head)
    assert cfg.test_evaluator.metric == 'bbox'
    assert cfg.model.type == 'DetTTAModel'


def test_tta_without_a_pipeline():
    cfg = evaluate.load_run_config(evaluate.parse_args([SEGMENTOR, 'x.pth']))
    cfg.pop('tta_model')
    with pytest.raises(ValueError, match=rf'--tta: {SEGMENTOR} has no tta_model'):
        augment(cfg)


@pytest.mark.parametrize(
    ('config', 'out', 'message'),
    [
        (CONFIG, 'predictions', r'--out must end in \.pkl or \.pickle, got predictions'),
        (SEGMENTOR, 'maps.pkl', r"--out must be a folder for a segmentor's .*, got maps\.pkl"),
        (SEGMENTOR, 'README.md', r"--out must be a folder for a segmentor's .*, got README\.md"),
    ],
)
def test_out_that_does_not_fit(config, out, message):
    arguments = evaluate.parse_args([config, 'x.pth', '--out', out])
    with pytest.raises(SystemExit, match=f'error: {message}'):
        evaluate.build_config(arguments)


@pytest.fixture(scope='module')
def mask_run(digits_options, tmp_path_factory):
    """Predictions of a Mask R-CNN, trained for an iteration, as test.py --out writes them."""
    config = 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py'
    folder = tmp_path_factory.mktemp('masks')
    options = [
        '--work-dir', str(folder), '--cfg-options', *digits_options, *ONE_EPOCH,
        'model.test_cfg.rcnn.score_thr=0.0', 'train_dataloader.batch_size=12',
    ]  # fmt: skip
    program('train', config, *options)
    out, checkpoint = folder / 'out.pkl', str(folder / 'epoch_1.pth')
    said = program('test', config, checkpoint, '--out', str(out), *options)
    return config, out, said, options


def upstream(package: str, tool: str, *arguments: str) -> str:
    """What a tool of an installed package of OpenMMLab prints."""
    (folder,) = importlib.util.find_spec(package).submodule_search_locations
    command = [sys.executable, f'{folder}/.mim/tools/{tool}.py', *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_out_of_a_detector_with_masks(mask_run, tmp_path):
    """Masks as run lengths; mmdet's tools evaluate it, to the same figures, and draw from it."""
    config, out, said, (_, _, *options) = mask_run
    samples = pickle.loads(out.read_bytes())
    assert len(samples) == 4
    masks = [mask for sample in samples for mask in sample['pred_instances']['masks']]
    assert masks
    assert all(mask['size'] == [96, 96] and isinstance(mask['counts'], bytes) for mask in masks)
    metrics = upstream('mmdet', 'analysis_tools/eval_metric', config, str(out), *options)
    for kind in ('bbox', 'segm'):
        name = f'coco/{kind}_mAP_50'
        printed = float(re.search(rf'^{name}: (\S+)$', said, re.MULTILINE)[1])
        assert float(re.search(rf"'{name}': ([^,]+)", metrics)[1]) == printed
    folder = tmp_path / 'confusion'
    upstream('mmdet', 'analysis_tools/confusion_matrix', config, str(out), str(folder), *options)
    assert list(folder.glob('*.png'))


@pytest.mark.slow
def test_tools_of_mmdet(run, options, tmp_path):
    """Those of the README that the tests above have not run."""
    assert "type='ACmixResNet'" in upstream('mmdet', 'misc/print_config', CONFIG)
    browse = [CONFIG, '--output-dir', str(tmp_path / 'pictures'), '--not-show', *options]
    upstream('mmdet', 'analysis_tools/browse_dataset', *browse)
    assert len(list((tmp_path / 'pictures').iterdir())) == 12
    (log,) = map(str, run.glob('*/vis_data/scalars.json'))
    curve = str(tmp_path / 'loss.png')
    plot = ['plot_curve', log, '--keys', 'loss', '--style', 'default', '--out', curve]
    upstream('mmdet', 'analysis_tools/analyze_logs', *plot)
    assert Path(curve).is_file()


@pytest.fixture(params=['missing', 'garbage', 'truncated', 'no weights'])
def bad_checkpoint(request, run, tmp_path):
    """A checkpoint file that cannot serve, and the message that says so."""
    path = tmp_path / 'bad.pth'
    if request.param == 'garbage':
        path.write_bytes(b'not a checkpoint')
    elif request.param == 'truncated':
        path.write_bytes((run / 'epoch_2.pth').read_bytes()[:10000])
    elif request.param == 'no weights':
        torch.save({'state_dict': {}}, path)
    messages = {'missing': 'does not exist', 'no weights': 'holds no weights'}
    return path, messages.get(request.param, 'cannot be read, it may be damaged')


@pytest.mark.parametrize('program', ['train', 'test', 'predict'])
def test_bad_checkpoint(program, bad_checkpoint, options, scene_digits, tmp_path):
    path, message = bad_checkpoint
    work = ['--work-dir', str(tmp_path / 'work')]
    arguments = {
        'train': [CONFIG, '--resume', str(path), *work],
        'test': [CONFIG, str(path), *work],
        'predict': [str(scene_digits / 'coco' / 'val2017'), CONFIG, str(path), '--out-dir',
                    str(tmp_path / 'work')],
    }  # fmt: skip
    with pytest.raises(SystemExit, match=rf'error: checkpoint .*bad\.pth {message}'):
        PROGRAMS[program].main([*arguments[program], *options])
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('program', ['train', 'test'])
def test_missing_config(program):
    checkpoint = ['x.pth'] if program == 'test' else []
    with pytest.raises(SystemExit, match=r'config configs/none\.py does not exist'):
        PROGRAMS[program].main(['configs/none.py', *checkpoint])
