"""Steps of whole models: backbones, detectors, and trained models on the data of their config.

Weights are float32, other dtypes come by autocast, of backbones also by casting.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint, set_random_seed
from torch import Tensor, nn

from ..checkpoints import make_checkpoints_loadable
from ..layers.deployable import Deployable
from ..models import deploy, set_backend
from ..weights import build
from .baselines import UNFOLDED, unfold_operators
from .costs import count_flops, network_costs
from .steps import DTYPES, Case, Step, autocast, model_step, random_maps, weight_bytes


def backbone_config(file: str) -> ConfigDict:
    """The backbone of a config file, on its own there or part of a model.

    It is without what would load weights, and so are models of :func:`model_config`: initial values
    are enough here.

    Args:
        file (str): A file of ``configs/_base_/backbones``, or any with ``model.backbone``.
    """
    cfg = Config.fromfile(file)
    backbone = cfg.backbone if 'backbone' in cfg else cfg.model.backbone
    return ConfigDict(without_checkpoints(backbone.to_dict()))


def model_config(file: str) -> ConfigDict:
    """The model of a config file, see :func:`backbone_config`."""
    return ConfigDict(without_checkpoints(Config.fromfile(file).model.to_dict()))


@dataclass(frozen=True)
class Abilities:
    """Whether layers of a model take a backend, fold for inference, have an unfold formulation."""

    backends: bool = False
    deploys: bool = False
    unfolds: bool = False


@functools.cache
def abilities(config_of: Callable[[str], dict], file: str) -> Abilities:
    """Of the model of a config file, by :func:`backbone_config` or :func:`model_config`."""
    try:
        modules = list(build_model(config_of(file)).modules())
    except Exception:  # as a candidate it fails again, and is reported
        return Abilities()
    return Abilities(
        backends=any(hasattr(module, 'backend') for module in modules),
        deploys=any(isinstance(module, Deployable) for module in modules),
        unfolds=any(type(module) in UNFOLDED for module in modules),
    )


def build_backbone(file: str, backend: str | None, form: str, case: Case) -> Step:
    """A backbone on images (B, 3, H, W); the loss is the sum of the means of its outputs.

    ``form`` is 'plain', 'deployed' or 'unfolded'.
    All of it trains: nothing is frozen, normalisation layers use the statistics of the batch.
    """
    backbone = build_model(backbone_config(file), backend)
    for module in backbone.modules():
        if hasattr(module, 'norm_eval'):
            module.norm_eval = False
        if hasattr(module, 'frozen_stages'):
            module.frozen_stages = -1
    inputs = case if case.cast else dataclasses.replace(case, dtype='float32')
    backbone.requires_grad_().to(case.device, DTYPES[inputs.dtype]).train(case.train)
    if form == 'deployed':
        deploy(backbone.eval())
    elif form == 'unfolded':
        unfold_operators(backbone)
    (images,) = random_maps(1, inputs)

    def run(images: Tensor) -> None:
        with torch.set_grad_enabled(case.train), autocast(case):
            outputs = backbone(images)
            if case.train:
                loss = sum(out.mean(dtype=torch.float32) for out in outputs)
        if case.train:
            loss.backward()

    def small() -> None:
        run(images[:2, :, :64, :64].contiguous())

    return Step(lambda: run(images), small, list(backbone.parameters()), weight_bytes(backbone))


def build_detector(file: str, backend: str | None, form: str, case: Case) -> Step:
    """A detector on one image (height, width), with ten boxes (and masks) to train on.

    ``form`` is 'plain' or 'deployed'.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    detector = build_model(model_config(file), backend)
    MMLogger.get_current_instance().setLevel('ERROR')  # init_weights logs every parameter
    detector.init_weights()  # else scores start at 0.5 and suppression takes most of the time
    detector.to(case.device).train(case.train)
    if form == 'deployed':
        deploy(detector.eval())

    def make_data(height: int, width: int) -> dict:
        generator = torch.Generator().manual_seed(0)
        corner = torch.rand(10, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        boxes = torch.cat([corner, corner + torch.tensor([width, height]) * 0.25], 1)
        truth = InstanceData(bboxes=boxes, labels=torch.zeros(10, dtype=torch.long))
        if getattr(detector, 'with_mask', False):
            masks = np.zeros((10, height, width), dtype=np.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
                mask[y1 : y2 + 1, x1 : x2 + 1] = 1
            truth.masks = BitmapMasks(masks, height, width)
        size = (height, width)
        meta = {'img_shape': size, 'ori_shape': size, 'scale_factor': (1.0, 1.0), 'img_id': 0}
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        sample = DetDataSample(metainfo=meta, gt_instances=truth)
        return {'inputs': [image], 'data_samples': [sample]}

    return model_step(detector, make_data(*case.shape), make_data(64, 64), case)


@functools.cache
def detector_costs(file: str, form: str, size: tuple[int, int]) -> dict[str, int]:
    """Parameters and FLOPs of what :func:`build_detector` builds, for one image.

    FLOPs are those of :func:`.costs.prediction`; nothing for a model that cannot be built.
    """
    try:
        model = initial_model(Config.fromfile(file))
        if form == 'deployed':
            deploy(model)
        return asdict(network_costs(model, size).whole)
    except Exception:  # as a candidate it fails again, and is reported
        return {}


def build_trained(config: str, checkpoint: str, case: Case) -> Step:
    """The first image of the test data, or the first batch of the training data."""
    cfg, model = trained_model(config, checkpoint)
    model.to(case.device).train(case.train)
    data = first_samples(cfg, case.train)
    return model_step(model, data, data, case)


def trained_model(config: str, checkpoint: str) -> tuple[Config, nn.Module]:
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    model = MODELS.build(cfg.model)
    make_checkpoints_loadable()  # perhaps the first in a process of its own
    load_checkpoint(model, checkpoint, map_location='cpu', logger='silent')
    return cfg, model


def first_samples(cfg: Config, train: bool) -> dict:
    """Collated samples; random transforms are the same at every call."""
    set_random_seed(0)
    loader = cfg.train_dataloader if train else cfg.test_dataloader
    dataset = DATASETS.build(loader.dataset)
    count = loader.batch_size if train else 1
    return pseudo_collate([dataset[index % len(dataset)] for index in range(count)])


def complexity(config: str, checkpoint: str, device: str) -> dict:
    """Parameters of the backbone and in all, and FLOPs of a prediction as in :func:`build_trained`.

    Returns:
        dict: ``backbone_parameters``, ``parameters``; ``image``, (height, width) as the model gets
        it; ``flops``, see :func:`count_flops`.
    """
    cfg, model = trained_model(config, checkpoint)
    data = first_samples(cfg, False)
    model.to(device).eval()
    parts = {'backbone_parameters': model.backbone, 'parameters': model}
    return {
        **{name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        'image': tuple(data['inputs'][0].shape[-2:]),
        'flops': count_flops(model_step(model, data, data, Case((), False, device=device))),
    }


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width that the test pipeline of a config ends with.

    Raises:
        ValueError: If it names none.
    """
    dataset = cfg.get('test_dataloader', {}).get('dataset', {})
    while 'dataset' in dataset:  # wrappers
        dataset = dataset['dataset']
    size = None
    for transform in dataset.get('pipeline', []):
        if transform['type'] == 'Resize' and 'scale' in transform:
            scale = transform['scale']
            size = (scale, scale) if isinstance(scale, int) else tuple(scale)[::-1]
        elif transform['type'] == 'CenterCrop':
            crop = transform['crop_size']
            size = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if size is None:
        raise ValueError(
            'cfg must have a test pipeline that resizes or crops images to a size, got none'
        )
    return size


def initial_model(cfg: Config) -> nn.Module:
    """The model of a config with initial weights, in evaluation mode."""
    model = build(cfg, ConfigDict(without_checkpoints(cfg.model.to_dict())))
    MMLogger.get_current_instance().setLevel('ERROR')  # init_weights logs every parameter
    model.init_weights()
    return revert_sync_batchnorm(model).eval()


def build_model(config: dict, backend: str | None = None) -> nn.Module:
    """By mmdet's registry, which knows ours too; ``backend`` goes to all layers that have one."""
    from mmdet.registry import MODELS

    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(config)
    if backend is not None:
        set_backend(model, backend)
    return model


def without_checkpoints(config):
    """The config without what would load weights, or rely on loaded ones."""
    if isinstance(config, dict):
        return {
            k: without_checkpoints(v)
            for k, v in config.items()
            if k not in ('pretrained', 'warm_start')
            and not (k == 'init_cfg' and 'checkpoint' in str(v))
        }
    if isinstance(config, (list, tuple)):
        return type(config)(without_checkpoints(v) for v in config)
    return config
