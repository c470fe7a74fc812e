"""ONNX files from picture to results: parts against OpenMMLab's code, wholes by programs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip('onnxruntime')
pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
import cv2
import mmdet.datasets  # noqa: F401, registers transforms
import mmseg.datasets  # noqa: F401
import onnx
import onnxruntime
from export_model import data_of
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from onnx import parser
from programs import program

from acmix_mm.backbones import SAN
from acmix_mm.onnx_graphs import (
    Preprocessing,
    detections_graph,
    label_map_graph,
    pad_to_multiples,
    preprocessing_graph,
    preprocessing_of,
)
from acmix_mm.onnx_model import (
    ONNXModel,
    _AdaptiveAvgPool,
    check_detector,
    check_segmentor,
    export_model,
)
from acmix_mm.weights import build

DETECTOR = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
ROOT = Path(__file__).parents[1]


def session(text: str):
    return onnxruntime.InferenceSession(parser.parse_model(text).SerializeToString())


def outputs(run, **inputs) -> dict:
    names = [output.name for output in run.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, run.run(names, inputs)), strict=True))


def picture(height: int, width: int) -> np.ndarray:
    """Smooth spots in BGR, where resizing has something to interpolate."""
    small = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def by_openmmlab(cfg: Config, image: np.ndarray) -> tuple[torch.Tensor, dict]:
    """The network's input and the metadata, by the test pipeline and the preprocessor."""
    init_default_scope(cfg.default_scope)
    data = {'img': image, 'img_shape': image.shape[:2], 'ori_shape': image.shape[:2]}
    for transform in cfg.test_dataloader.dataset.pipeline:
        if transform.type.startswith('Load'):
            continue
        if transform.type.startswith('Pack'):
            transform = {**transform, 'meta_keys': ('ori_shape', 'img_shape', 'scale_factor')}
        data = TRANSFORMS.build(transform)(data)
    preprocessor = MODELS.build(cfg.model.data_preprocessor)
    batch = preprocessor(pseudo_collate([data]), False)
    return batch['inputs'], batch['data_samples'][0].metainfo


@pytest.mark.parametrize('size', [(427, 640), (640, 427), (100, 90), (150, 1000)])
@pytest.mark.parametrize(
    'config',
    [
        'acmix_resnet/retinanet_acmix-r50_fpn_8xb2-1x_coco.py',
        'demo/retinanet_acmix-r26_fpn_scene-digits.py',
        'demo/rtmdet_acmix-r26_scene-digits.py',
        'acmix_pvt/acmix-pvt-t_fpn_8xb2-80k_ade20k-512x512.py',
        'acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py',
    ],
)
def test_preprocessing(config, size):
    cfg = Config.fromfile(ROOT / 'configs' / config)
    pad_to_multiples(cfg)
    image = picture(*size)
    expected, meta = by_openmmlab(cfg, image)
    run = session(preprocessing_graph(preprocessing_of(cfg, 32)))
    got = outputs(run, picture=np.ascontiguousarray(image[..., ::-1]))
    assert got['image'].shape == expected.shape
    assert tuple(got['size']) == meta['img_shape']
    assert tuple(got['original']) == size
    # OpenMMLab's resizing rounds weights, too: now and then, a byte differs by one each time.
    step = 1 / min(preprocessing_of(cfg, 32).std)
    times = max(1, len(preprocessing_of(cfg, 32).resizes))
    assert (got['image'] - expected).abs().max() <= 1.01 * times * step
    assert ((got['image'] - expected).abs() > 0.01 * step).float().mean() < 0.25


def test_small_pictures_are_padded():
    run = session(preprocessing_graph(Preprocessing(divisor=32, least=96, pad_value=7.0)))
    got = outputs(run, picture=np.full((3, 100, 3), 5, np.uint8))
    assert got['image'].shape == (1, 3, 96, 128)
    assert (got['image'][..., :3, :100] == 5).all()
    assert (got['image'][..., 3:, :] == 7).all()
    assert got['padded'].tolist() == [96, 128]


@pytest.mark.parametrize('scale', [(1.0, 1.0), (0.7, 0.5)])
@pytest.mark.parametrize(
    ('head', 'test_cfg'),
    [
        ('RetinaHead', {'nms_pre': 40, 'min_bbox_size': 0, 'score_thr': 0.3}),
        ('RetinaHead', {'nms_pre': 1000, 'min_bbox_size': 12, 'score_thr': 0.1}),
        ('FCOSHead', {'nms_pre': 60, 'score_thr': 0.2}),
        ('RetinaHead', {'nms_pre': 1000, 'min_bbox_size': 0, 'score_thr': 1.0}),
    ],
)
def test_detections(head, test_cfg, scale):
    """As mmdet chooses among the same scores and boxes."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    test_cfg = ConfigDict({**test_cfg, 'nms': {'type': 'nms', 'iou_threshold': 0.5}})
    test_cfg.max_per_img = 30
    options = {'strides': [8, 16]} if head == 'FCOSHead' else {}
    if head == 'FCOSHead':
        options['regress_ranges'] = ((-1, 64), (64, 1e8))
    else:
        options['anchor_generator'] = {
            'type': 'AnchorGenerator', 'ratios': [0.5, 1.0], 'scales': [4], 'strides': [8, 16],
        }  # fmt: skip
    head = MODELS.build(
        {'type': head, 'num_classes': 3, 'in_channels': 4, 'test_cfg': test_cfg, **options}
    )
    sizes = [(12, 16), (6, 8)]
    anchors = head.num_base_priors
    scores = [torch.randn(1, anchors * 3, *size) for size in sizes]
    boxes = [torch.rand(1, anchors * 4, *size) * (20 if options.get('strides') else 1)
             for size in sizes]  # fmt: skip
    factors = [torch.randn(1, anchors, *size) for size in sizes]
    maps = [scores, boxes, *([factors] if options.get('strides') else [])]
    shape, original = (
        (90, 120),
        tuple(round(side / s) for side, s in zip((90, 120), scale, strict=True)),
    )
    true_scale = (shape[1] / original[1], shape[0] / original[0])
    meta = {'img_shape': shape, 'ori_shape': original, 'scale_factor': true_scale}
    (expected,) = head.predict_by_feat(*maps, batch_img_metas=[meta], rescale=True)
    inputs = {}
    for i, points in enumerate(head.prior_generator.grid_priors(sizes, device='cpu')):
        level = [m[i].permute(0, 2, 3, 1) for m in maps]
        inputs[f'scores{i}'] = level[0].reshape(-1, 3).sigmoid()
        inputs[f'boxes{i}'] = head.bbox_coder.decode(points, level[1].reshape(-1, 4))
        if len(level) > 2:
            inputs[f'factors{i}'] = level[2].reshape(-1).sigmoid()
    inputs = {name: value.numpy() for name, value in inputs.items()}
    sides = {'original': original, 'size': shape, 'resized': shape}
    sides = {name: np.array(value) for name, value in sides.items()}
    run = session(detections_graph(2, 3, test_cfg, len(maps) > 2))
    got = outputs(run, **inputs, **sides)
    assert len(got['scores']) == len(expected.scores)
    assert len(expected.scores) == (0 if test_cfg.score_thr == 1.0 else 30)
    torch.testing.assert_close(got['scores'], expected.scores)
    torch.testing.assert_close(got['boxes'], expected.bboxes, rtol=1e-4, atol=1e-3)
    assert torch.equal(got['labels'], expected.labels)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('classes', [4, 1])
def test_label_map(classes, align_corners):
    logits = torch.randn(1, classes, 8, 12, generator=torch.Generator().manual_seed(0))
    run = session(label_map_graph(classes, align_corners, 0.4))
    sizes = {'original': (41, 50), 'resized': (60, 90), 'padded': (64, 96)}
    sizes = {name: np.array(size) for name, size in sizes.items()}
    got = outputs(run, logits=logits.numpy(), **sizes)['label_map']
    large = F.interpolate(logits, (64, 96), mode='bilinear', align_corners=align_corners)
    final = F.interpolate(
        large[..., :60, :90], (41, 50), mode='bilinear', align_corners=align_corners
    )[0]
    expected = final.argmax(0) if classes > 1 else (final[0].sigmoid() > 0.4).long()
    assert (got != expected).float().mean() < 1e-3
    assert len(got.unique()) == max(2, classes)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'type': 'RandomFlip', 'prob': 0.5}, "got {'type': 'RandomFlip', 'prob': 0.5}"),
        ({'type': 'Resize', 'scale': 9, 'interpolation': 'nearest'}, 'resize .bilinear.'),
    ],
)
def test_unsupported_transforms(change, message):
    cfg = Config.fromfile(ROOT / DETECTOR)
    cfg.test_dataloader.dataset.pipeline.insert(1, ConfigDict(change))
    with pytest.raises(ValueError, match=message):
        preprocessing_of(cfg, 96)


def test_unsupported_models():
    cfg = Config.fromfile(ROOT / 'configs/demo/mask-rcnn_acmix-swin_fpn_scene-digits.py')
    with pytest.raises(ValueError, match=r'must be a one-stage detector .* got MaskRCNN'):
        check_detector(build(cfg))
    cfg = Config.fromfile(ROOT / 'configs/demo/acmix-pvt_fpn_scene-digits.py')
    cfg.model.test_cfg = {'mode': 'slide', 'crop_size': (32, 32), 'stride': (16, 16)}
    with pytest.raises(ValueError, match=r"test_cfg.mode must be 'whole', got 'slide'"):
        check_segmentor(build(cfg))
    cfg = Config.fromfile(ROOT / DETECTOR)
    cfg.model.test_cfg.nms.type = 'soft_nms'
    with pytest.raises(ValueError, match=r"nms.type must be 'nms', got 'soft_nms'"):
        check_detector(build(cfg))


@pytest.mark.parametrize('bins', [1, 2, 3, 6, (2, 5)])
@pytest.mark.parametrize('size', [(3, 3), (7, 12), (25, 42)])
def test_adaptive_pooling(size, bins):
    maps = torch.randn(2, 4, *size)
    torch.testing.assert_close(_AdaptiveAvgPool(bins)(maps), F.adaptive_avg_pool2d(maps, bins))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'options'),
    [
        ('acmix-swin_upernet', {'depths': [1, 1, 2, 2]}),
        ('retinanet_acmix-swin-t_fpn', {'depths': [1, 1, 2, 1], 'conv_on_shifted': False}),
        ('retinanet_acmix-san10_fpn', {}),
        ('retinanet_dwnet-t_fpn', {'arch.depths': [1, 1, 1, 1], 'dynamic': 'homogeneous'}),
    ],
)
def test_any_size(config, options, tmp_path, monkeypatch):
    """Maps smaller and larger than Swin's windows of 6 pixels, and of several windows."""
    monkeypatch.setattr(SAN, 'arch_settings', {10: (1, 1, 1, 1, 1)})
    monkeypatch.setattr(SAN, 'kernel_sizes', (3, 3, 3, 3, 3))
    cfg = Config.fromfile(ROOT / f'configs/demo/{config}_scene-digits.py')
    cfg.merge_from_dict({f'model.backbone.{key}': value for key, value in options.items()})
    pad_to_multiples(cfg)
    pipeline = cfg.test_dataloader.dataset.pipeline
    if 'test_cfg' in cfg.model and 'score_thr' in cfg.model.test_cfg:
        cfg.model.test_cfg.score_thr = 0.0
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = build(cfg).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # scale and shift of norms, rates
            parameter.data += 0.1 * torch.randn_like(parameter)
    file = str(tmp_path / 'model.onnx')
    with torch.no_grad():
        export_model(model, cfg, file, {'classes': list('0123456789'), 'palette': None})
        loaded = ONNXModel(file)
        for size in ((96, 96), (120, 250), (224, 448), (417, 96)):
            image = picture(*size)
            (expected,) = model.test_step(data_of(pipeline, image))
            (got,) = loaded.test_step(data_of(pipeline[-1:], image))
            if 'pred_sem_seg' in expected:
                labels = expected.pred_sem_seg.data
                assert len(labels.unique()) > 1
                assert (got.pred_sem_seg.data != labels).float().mean() < 1e-3
            else:
                scores = expected.pred_instances.scores
                # Untrained, all are close to each other.
                assert scores.std() > 1e-5
                found = got.pred_instances.scores
                torch.testing.assert_close(found, scores, rtol=1e-3, atol=1e-4)
                assert (found - scores).abs().max() < 0.1 * scores.std()


def test_sizes_that_become_constants(tmp_path, monkeypatch):
    """The exporter's message for them, in one line."""

    def refuse(*args, **kwargs):
        kind = torch._dynamo.exc.UserErrorType.CONSTRAINT_VIOLATION
        raise torch._dynamo.exc.UserError(kind, 'Constraints violated (h)!\n  - Not all values')

    monkeypatch.setattr('acmix_mm.onnx_model.export_onnx', refuse)
    cfg = Config.fromfile(ROOT / 'configs/demo/acmix-pvt_fpn_scene-digits.py')
    said = (
        r'cannot be exported for pictures of any size: Constraints violated \(h\)! - Not all values'
    )
    with pytest.raises(ValueError, match=said):
        export_model(build(cfg).eval(), cfg, tmp_path / 'model.onnx', {'classes': ['a']})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('content', 'message'),
    [(None, 'is no file'), (b'', 'no ONNX model'), (b'not a model', 'no ONNX model')],
)
def test_bad_files(content, message, tmp_path):
    file = tmp_path / 'model.onnx'
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ONNXModel(str(file))


def test_file_of_another_program(tmp_path):
    file = tmp_path / 'model.onnx'
    onnx.save(parser.parse_model(label_map_graph(2, False, None)), file)
    with pytest.raises(ValueError, match='it names no task'):
        ONNXModel(str(file))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('config', 'length', 'metric'),
    [
        ('retinanet_acmix-r26_fpn', ['--max-epochs', '1'], 'coco/bbox_mAP_50'),
        ('rtmdet_acmix-r26', ['--max-epochs', '1'], 'coco/bbox_mAP_50'),
        ('acmix-pvt_fpn', ['--max-epochs', '1'], 'mIoU'),
        ('acmix-swin_upernet', ['--max-epochs', '1'], 'mIoU'),
    ],
)
def test_programs(config, length, metric, tmp_path, monkeypatch):
    """A trained model has the same metrics as a file, which draws pictures without a config."""
    monkeypatch.chdir(ROOT)
    data = tmp_path / 'data'
    program('dataset_converters/scene_digits', str(data), '--train', '160', '--val', '24')
    config = f'configs/demo/{config}_scene-digits.py'
    cfg = Config.fromfile(config)
    options = relocated(cfg, data)
    work_dir = tmp_path / 'work'
    program('train', config, '--work-dir', str(work_dir), *length, '--cfg-options', *options)
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    file = tmp_path / 'model.onnx'
    program('deploy/export_model', config, checkpoint, str(file))
    results = []
    for model in (checkpoint, str(file)):
        out = program('test', config, model, '--work-dir', str(tmp_path / 'test'),
                      '--cfg-options', *options)  # fmt: skip
        results.append(float(dict(line.split(': ', 1) for line in out.splitlines()
                                  if line.startswith(metric))[metric]))  # fmt: skip
    assert abs(results[0] - results[1]) <= (1e-3 if metric != 'mIoU' else 0.1)
    images = next(data.rglob('val2017' if metric != 'mIoU' else 'validation'))
    program('predict', str(images), str(file), '--out-dir', str(tmp_path / 'out'), '--limit', '3')
    entries = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert len(entries) == 3
    assert all((tmp_path / 'out' / entry['picture']).is_file() for entry in entries)


def relocated(cfg: Config, data: Path) -> list[str]:
    """Options with which a demo's config reads its data from another folder."""
    old, new = 'data/scene_digits', str(data)
    options = []
    for name in ('train', 'val', 'test'):
        root = cfg[f'{name}_dataloader'].dataset.data_root
        options.append(f'{name}_dataloader.dataset.data_root={root.replace(old, new)}')
    for name in ('val', 'test'):
        file = cfg[f'{name}_evaluator'].get('ann_file')
        if file:
            options.append(f'{name}_evaluator.ann_file={file.replace(old, new)}')
    return options
