"""Whole detectors and segmentors as one ONNX file, and such a file in the place of a model."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import Tensor, nn

from .onnx_export import export_onnx
from .onnx_graphs import (
    Preprocessing,
    detections_graph,
    label_map_graph,
    preprocessing_graph,
    preprocessing_of,
)

LEAST, MOST = 96, 8192  # height and width of a network's input
# At which it is traced, about: the deepest maps have several windows of Swin (7, 12 pixels), as a
# size of one becomes a constant.
TRACED = (417, 482)
OPSET = 18
METADATA = 'acmix_mm'  # key of what a file says of itself
META_KEYS = ('img_id', 'img_path', 'ori_shape', 'img_shape')  # of pictures that nothing resizes


# Export.


class _AdaptiveAvgPool(nn.Module):
    """nn.AdaptiveAvgPool2d as products with matrices of weights, made for any size.

    Args:
        output_size (int | tuple[int, int]): Height and width of the result.
    """

    def __init__(self, output_size: int | tuple[int, int]):
        super().__init__()
        pair = isinstance(output_size, tuple)
        self.output_size = output_size if pair else (output_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (
            self._weights(bins, x.size(dim), x.device)
            for bins, dim in zip(self.output_size, (-2, -1), strict=True)
        )
        return rows @ x @ columns.T

    @staticmethod
    def _weights(bins: int, size: int, device: torch.device) -> Tensor:
        """(bins, size): bin i is the mean from floor(i * size / bins) to ceil((i + 1) * ...)."""
        bin_, pixel = torch.arange(bins, device=device)[:, None], torch.arange(size, device=device)
        inside = ((pixel + 1) * bins > bin_ * size) & (pixel * bins < (bin_ + 1) * size)
        return inside / inside.sum(1, keepdim=True)


def _for_any_size(model: nn.Module) -> nn.Module:
    """A copy whose modules leave sizes open where the exporter would make constants of them."""
    from mmseg.models.utils import Upsample

    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(module, name, _AdaptiveAvgPool(child.output_size))
            elif isinstance(child, Upsample) and not child.size:  # integers of Python
                options = (child.scale_factor, child.mode, child.align_corners)
                setattr(module, name, nn.Upsample(None, *options))
    return model


class _Detections(nn.Module):
    """Scores and boxes of every level of a one-stage detector, before any is chosen."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        head = self.model.bbox_head
        maps = head(self.model.extract_feat(image))
        priors = head.prior_generator.grid_priors([m.shape[-2:] for m in maps[0]], device='cpu')
        out = []
        for points, *level in zip(priors, *maps, strict=True):
            scores, boxes, *factors = (m.permute(0, 2, 3, 1) for m in level)
            scores = scores.reshape(-1, head.cls_out_channels)
            activated = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[:, :-1]
            boxes = boxes.reshape(-1, head.bbox_coder.encode_size)
            out += [activated, head.bbox_coder.decode(points, boxes)]
            out += [f.reshape(-1).sigmoid() for f in factors]
        return out


class _Logits(nn.Module):
    """Logits of a segmentor, at the size at which its head gives them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.decode_head(self.model.extract_feat(image))


def export_model(model: nn.Module, cfg: Config, file: str | Path, meta: dict) -> None:
    """Write a detector or segmentor as an ONNX file that takes pictures and gives results.

    The input is ``picture``, uint8 (H, W, 3) in RGB. Outputs of a detector are ``boxes``, float32
    (n, 4) as x1, y1, x2, y2 in pixels of the picture, ``scores`` (n,), falling, and ``labels``,
    int64 (n,); that of a segmentor is ``label_map``, int32 (H, W). Resizing, padding and
    normalisation are those of the config's test pipeline.

    Args:
        model (nn.Module): One-stage detector of mmdet, with a head whose post-processing is
            BaseDenseHead's (RetinaNet, FCOS, ATSS, RTMDet), or EncoderDecoder of mmseg.
        cfg (Config): Its config.
        file (str | Path): File to write.
        meta (dict): ``classes``, names, and ``palette``, colours or None.

    Raises:
        ImportError: If a package is not installed.
        ValueError: If something of the model or its config has no counterpart in the file.
    """
    for name in ('onnx', 'onnxscript'):
        if find_spec(name) is None:
            raise ImportError(f'export to ONNX needs {name}: pip install onnx onnxscript')
    import onnx

    segments = cfg.get('default_scope') == 'mmseg'
    (check_segmentor if segments else check_detector)(model)
    model = _for_any_size(model)
    preprocessing = preprocessing_of(cfg, LEAST)
    if segments:
        network, outputs = _Logits(model), ['logits']
        head = model.decode_head
        results = label_map_graph(head.out_channels, head.align_corners, head.threshold)
    else:
        network, head = _Detections(model), model.bbox_head
        with torch.no_grad():
            maps = head(model.extract_feat(torch.zeros(1, 3, LEAST, LEAST)))
        names = ['scores', 'boxes', *(['factors'] if len(maps) > 2 else [])]
        outputs = [f'{name}{i}' for i in range(len(maps[0])) for name in names]
        results = detections_graph(len(maps[0]), head.num_classes, head.test_cfg, len(maps) > 2)
    divisor = preprocessing.divisor
    limits = {'min': -(-LEAST // divisor), 'max': MOST // divisor}
    sizes = {dim: torch.export.Dim(name, **limits) for dim, name in ((2, 'rows'), (3, 'columns'))}
    dynamic = ({dim: divisor * size if divisor > 1 else size for dim, size in sizes.items()},)
    image = torch.rand(1, 3, *(side // divisor * divisor for side in TRACED))
    names = {'input_names': ['image'], 'output_names': outputs}
    try:
        export_onnx(network, (image,), file, dynamic_shapes=dynamic, opset_version=OPSET, **names)
    except torch._dynamo.exc.UserError as error:  # heads with align_corners, for one
        reason = ' '.join(str(error).split())
        raise ValueError(
            f'{type(model).__name__} cannot be exported for pictures of any size: {reason}'
        ) from error
    merged = _surround(onnx.load(file), preprocessing, results)
    merged.doc_string = f'{type(model).__name__} of acmix_mm, from picture to results'
    described = {'task': 'segmentation' if segments else 'detection', **meta}
    onnx.helper.set_model_props(merged, {METADATA: json.dumps(described)})
    onnx.checker.check_model(merged)
    onnx.save(merged, file)


def _surround(network, preprocessing: Preprocessing, results: str):
    """One ONNX model of the three parts."""
    from onnx import compose, parser

    parts = {'input': parser.parse_model(preprocessing_graph(preprocessing)), 'network': network}
    parts['results'] = parser.parse_model(results)
    for name, part in parts.items():
        part.ir_version = network.ir_version
        edges = {'rename_inputs': False, 'rename_outputs': False}
        parts[name] = compose.add_prefix(part, f'{name}/', **edges)
    ends = {name: [v.name for v in part.graph.output] for name, part in parts.items()}
    needed = [v.name for v in parts['results'].graph.input]
    sizes = [name for name in ends['input'] if name in needed]
    merged = compose.merge_models(
        parts['input'], parts['network'], [('image', 'image')], outputs=[*sizes, *ends['network']]
    )
    return compose.merge_models(merged, parts['results'], [(name, name) for name in needed])


def check_detector(model: nn.Module) -> None:
    """Raises ValueError unless :func:`export_model` knows the model's post-processing."""
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    head = getattr(model, 'bbox_head', None)
    own = type(head)
    methods = ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
    known = isinstance(head, BaseDenseHead) and all(
        getattr(own, method) is getattr(BaseDenseHead, method) for method in methods
    )
    custom = known and getattr(getattr(head, 'loss_cls', None), 'custom_activation', False)
    if getattr(model, 'roi_head', None) is not None or not known or custom:
        raise ValueError(
            'model must be a one-stage detector whose head has the post-processing of '
            "mmdet's BaseDenseHead, such as RetinaNet, FCOS, ATSS or RTMDet, got "
            f'{type(model).__name__} with {own.__name__ if head is not None else "no bbox_head"}'
        )
    kind = head.test_cfg.nms.get('type', 'nms')
    if kind != 'nms':
        raise ValueError(f"model.test_cfg.nms.type must be 'nms', got {kind!r}")


def check_segmentor(model: nn.Module) -> None:
    """Raises ValueError unless :func:`export_model` knows how the model predicts."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.models.segmentors import EncoderDecoder

    head = getattr(model, 'decode_head', None)
    known = isinstance(head, BaseDecodeHead) and type(model) is EncoderDecoder
    if not known or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat:
        raise ValueError(
            "model must be mmseg's EncoderDecoder with a head that predicts logits, got "
            f'{type(model).__name__} with {type(head).__name__}'
        )
    if model.test_cfg.get('mode') != 'whole':
        raise ValueError(f"model.test_cfg.mode must be 'whole', got {model.test_cfg.get('mode')!r}")


# A file in the place of a model.


@MODELS.register_module()
class ONNXModel(BaseModel):
    """Predicts with a file of :func:`export_model`, by ONNX Runtime.

    Takes pictures as ``LoadImageFromFile`` gives them, not resized.

    Args:
        file (str): The file.

    Attributes:
        task (str): 'detection' or 'segmentation'.
        dataset_meta (dict): ``classes`` and ``palette``.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If the file is none of :func:`export_model`.
    """

    def __init__(self, file: str, init_cfg: dict | None = None):
        super().__init__(init_cfg=init_cfg)
        self.session = open_session(file)
        described = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA])
        self.task = described.pop('task')
        palette = described.get('palette')
        described['palette'] = palette and [tuple(colour) for colour in palette]
        self.dataset_meta = described

    def forward(
        self, inputs: list[Tensor], data_samples: list[BaseDataElement], mode: str = 'predict'
    ) -> list[BaseDataElement]:
        """Predictions for pictures, uint8 (3, H, W) in BGR, put into their data samples."""
        if mode != 'predict':
            raise ValueError(f"mode must be 'predict' for an ONNX file, got {mode!r}")
        for picture, sample in zip(inputs, data_samples, strict=True):
            self._predict(picture, sample)
        return data_samples

    def _predict(self, picture: Tensor, sample: BaseDataElement) -> None:
        rgb = np.ascontiguousarray(picture.permute(1, 2, 0).flip(-1).cpu().numpy())
        names = [output.name for output in self.session.get_outputs()]
        values = self.session.run(names, {'picture': rgb})
        out = {name: torch.from_numpy(v) for name, v in zip(names, values, strict=True)}
        if self.task == 'segmentation':
            sample.pred_sem_seg = PixelData(data=out['label_map'][None].long())
        else:
            sample.pred_instances = InstanceData(
                bboxes=out['boxes'], scores=out['scores'], labels=out['labels']
            )


def open_session(file: str | Path):
    """An ``onnxruntime.InferenceSession`` for a file of :func:`export_model`."""
    if find_spec('onnxruntime') is None:
        raise ImportError(f'{file} needs ONNX Runtime: pip install onnxruntime')
    import onnxruntime

    if not Path(file).is_file():
        raise ValueError(f'{file} is no file')
    try:
        session = onnxruntime.InferenceSession(
            str(file), providers=onnxruntime.get_available_providers()
        )
    except Exception as error:  # of a class of its own for every kind of damage
        reason = ' '.join(str(error).split())
        raise ValueError(f'{file} is no ONNX model that ONNX Runtime can run: {reason}') from None
    if METADATA not in session.get_modelmeta().custom_metadata_map:
        raise ValueError(f'{file} is not from tools/deploy/export_model.py: it names no task')
    return session


def is_onnx(path: str | Path) -> bool:
    """Whether a file is an ONNX model by its name."""
    return Path(path).suffix == '.onnx'


def onnx_config(file: str | Path) -> Config:
    """A config with an ONNX file in the place of the model, for inferencers."""
    model = ONNXModel(str(file))
    scope, pack = {
        'detection': ('mmdet', 'PackDetInputs'),
        'segmentation': ('mmseg', 'PackSegInputs'),
    }[model.task]
    visualizer = 'SegLocalVisualizer' if scope == 'mmseg' else 'DetLocalVisualizer'
    pipeline = [{'type': 'LoadImageFromFile'}, {'type': pack, 'meta_keys': META_KEYS}]
    return Config(
        {
            'default_scope': scope,
            'model': {'type': 'ONNXModel', 'file': str(file)},
            'test_dataloader': {'dataset': {'pipeline': pipeline}},
            'visualizer': {'type': visualizer, 'name': 'visualizer'},
        }
    )


def use_onnx_file(cfg: Config, file: str | Path) -> dict:
    """Put an ONNX file into the place of a config's model, in place, to be tested on its data.

    Returns:
        dict: Its ``dataset_meta``.

    Raises:
        ValueError: If the file is of another task.
    """
    model = ONNXModel(str(file))
    scope = {'detection': 'mmdet', 'segmentation': 'mmseg'}[model.task]
    if cfg.get('default_scope') != scope:
        raise ValueError(
            f"{file} is a model for {model.task}, the config's default_scope is "
            f'{cfg.get("default_scope")!r}'
        )
    cfg.model = {'type': 'ONNXModel', 'file': str(file)}
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # wrappers
        dataset = dataset.dataset
    kept = [t for t in dataset.pipeline if t.type.startswith(('Load', 'Pack'))]
    dataset.pipeline = [
        {**t, 'meta_keys': META_KEYS} if t.type.startswith('Pack') else t for t in kept
    ]
    return model.dataset_meta
