"""What benchmark.py and compare.py measure: functions that build a step, by arguments that pickle.

A builder is called with the arguments of its candidate and a :class:`Case`, in the process that
measures time and again, in a fresh one, to measure memory.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import load_checkpoint, set_random_seed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from acmix_mm import deploy, set_backend
from acmix_mm.checkpoints import make_checkpoints_loadable
from acmix_mm.layers import ACmix, PatchACmix
from acmix_mm.layers.deployable import Deployable
from acmix_mm.ops import local_attention
from acmix_mm.ops._reflection import reflect_pad
from acmix_mm.ops.fused_acmix import position_encoding

KERNEL_SIZE = 7  # of the neighbourhoods
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Backbones by name, with the defaults of their classes; a new family comes in by a line.
BACKBONES = {
    'acmix-r26': {'type': 'ACmixResNet', 'depth': 26},
    'acmix-r38': {'type': 'ACmixResNet', 'depth': 38},
    'acmix-r50': {'type': 'ACmixResNet', 'depth': 50},
    'r50': {'type': 'ResNet', 'depth': 50},
    'swin-t': {'type': 'SwinTransformer'},
    'acmix-swin-t': {'type': 'ACmixSwinTransformer'},
    'acmix-swin-s': {'type': 'ACmixSwinTransformer', 'depths': (2, 2, 18, 2)},
    'pvt-s': {'type': 'PyramidVisionTransformer'},
    'pvt-t': {'type': 'PyramidVisionTransformer', 'num_layers': [2, 2, 2, 2]},
    'acmix-pvt-t': {'type': 'ACmixPyramidVisionTransformer', 'num_layers': [2, 2, 2, 2]},
    'acmix-pvt-s': {'type': 'ACmixPyramidVisionTransformer'},
    'san10': {'type': 'SAN', 'depth': 10},
    'san19': {'type': 'SAN', 'depth': 19},
    'acmix-san10': {'type': 'ACmixSAN', 'depth': 10},
    'acmix-san19': {'type': 'ACmixSAN', 'depth': 19},
    'x-volution-r50': {'type': 'XVolutionResNet', 'depth': 50},
    'dwnet-t': {'type': 'DWNet'},
    'dynamic-dwnet-t': {'type': 'DWNet', 'dynamic': 'homogeneous'},
}


@dataclass(frozen=True)
class Case:
    """What a candidate runs on; ``shape`` is the input's, (height, width) for detectors."""

    shape: tuple[int, ...]
    train: bool
    dtype: str = 'float32'
    device: str = 'cpu'

    @property
    def mode(self) -> str:
        return 'train' if self.train else 'forward'


@dataclass
class Step:
    """A candidate ready to run: call it for a step, :meth:`reset` it between steps."""

    run: Callable[[], object]
    small: Callable[[], object]  # the same on a very small input, which loads what steps need
    leaves: list[Tensor]  # what gets gradients
    weights: int = 0  # bytes of parameters and buffers

    def __call__(self) -> None:
        self.run()

    def reset(self) -> None:
        for tensor in self.leaves:
            tensor.grad = None


def random_maps(number: int, case: Case, shape: tuple[int, ...] | None = None) -> list[Tensor]:
    """Normal maps in dtype and on the device of the case, the same for every candidate."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape or case.shape, generator=generator) for _ in range(number)]
    return [m.to(case.device, DTYPES[case.dtype]) for m in maps]


# Attention alone, and operators: inputs and weights are cast to the dtype.


def unfold(maps: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """(B, N, d, H, W) -> (B, N, d, kernel_size^2, queries), neighbourhoods copied into memory."""
    padded = reflect_pad(maps.flatten(1, 2), kernel_size // 2)
    columns = F.unfold(padded, kernel_size, stride=stride)
    return columns.view(*maps.shape[:3], kernel_size**2, columns.size(-1))


def subsample(maps: Tensor, stride: int = 1) -> Tensor:
    """(B, N, d, H, W) -> (B, N, d, 1, queries)."""
    return maps[..., ::stride, ::stride].flatten(3).unsqueeze(3)


def unfold_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int,
    stride: int = 1,
    relative: Tensor | None = None,
) -> Tensor:
    """Attention (B, N, d, queries) of maps (B, N, d, H, W); ``relative`` is added to the keys."""
    keys = unfold(key, kernel_size, stride)
    if relative is not None:
        keys = keys + relative
    logits = (subsample(query, stride) * keys).sum(2, keepdim=True)
    del keys  # not to be held beside the values
    weights = (logits * query.size(2) ** -0.5).softmax(3)
    return (weights * unfold(value, kernel_size, stride)).sum(3)


class UnfoldACmix(ACmix):
    """The operator as it is usually written, at dilation 1: neighbourhoods unfolded into memory.

    Every key, value and relative position is copied kernel_size^2 times, and the convolution path
    keeps its intermediate map. Same parameters and results as :class:`ACmix`.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel_size, stride = self.attn_kernel_size, self.stride[0]
        heads, dim = self.num_heads, self.head_dim
        query, key, value = (
            F.conv2d(x, p['weight'], p['bias']).unflatten(1, (heads, dim))
            for p in (self.conv1, self.conv2, self.conv3)
        )
        position = position_encoding(self.conv_p['weight'].flatten(1), key)[None, None]

        relative = subsample(position, stride) - unfold(position, kernel_size, stride)
        attention = unfold_attention(query, key, value, kernel_size, stride, relative)

        maps = torch.cat([m.flatten(2, 3) for m in (query, key, value)], 1)
        mixed = F.conv2d(maps, self.fc['weight'])
        mixed = mixed.unflatten(2, (dim, -1)).transpose(1, 2).flatten(1, 2)
        padding = self.kernel_size[0] // 2
        convolution = F.conv2d(mixed, self.dep_conv['weight'], None, stride, padding, 1, dim)
        attention = attention.reshape(convolution.shape)
        return self.rate1 * attention + self.rate2 * convolution


class UnfoldPatchACmix(PatchACmix):
    """SAN's operator as it is usually written: patches of keys and of values unfolded into memory.

    Same parameters and results as :class:`PatchACmix`.
    """

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        if norm is not None:
            x = F.relu(norm(x))
        kernel_size = self.attn_kernel_size
        query, key, value = self.conv1(x), self.conv2(x), self.conv3(x)
        patch = unfold(key[:, None], kernel_size).flatten(1, 3).unsqueeze(2)
        weights = self.conv_w(torch.cat([query.flatten(2).unsqueeze(2), patch], 1))
        del patch  # not to be held beside the values
        weights = weights.view(x.size(0), 1, -1, kernel_size**2, weights.size(-1))
        values = unfold(value.unflatten(1, (-1, weights.size(2))), kernel_size)
        attention = (weights * values).sum(3).view_as(value)
        maps = torch.cat([query, key, value], 1).unflatten(1, (6, -1)).transpose(1, 2)
        return self.mixing_weights().mix(maps, attention, self.backend)


UNFOLDED = {ACmix: UnfoldACmix, PatchACmix: UnfoldPatchACmix}
UNFOLD_BACKBONES = ('ACmixResNet', 'ACmixSAN')  # those made of these layers


def unfold_operators(model: nn.Module) -> None:
    """Bring all layers of ours that have one into their unfold formulation, in place."""
    for module in model.modules():
        module.__class__ = UNFOLDED.get(type(module), type(module))


def build_operator(name: str, backend: str | None, case: Case) -> Step:
    """A layer, 'acmix', 'acmix deployed', 'unfold' or 'conv3x3', on a map (B, C, H, W)."""
    channels = case.shape[1]
    torch.manual_seed(0)  # equal weights in all forms of ACmix
    if name == 'conv3x3':
        layer = nn.Conv2d(channels, channels, 3, padding=1)
    elif name == 'unfold':
        layer = UnfoldACmix(channels, channels)
    else:
        layer = ACmix(channels, channels, backend=backend)
    layer.to(case.device, DTYPES[case.dtype]).train(case.train)
    if name == 'acmix deployed':
        deploy(layer.eval())
    x, grad = random_maps(2, case)
    return tensor_step(layer, [x], grad, case, layer)


def build_attention(name: str, backend: str | None, case: Case) -> Step:
    """Neighbourhood attention, 'local_attention', 'unfold' or 'flex', on (B, N, d, H, W)."""
    *inputs, grad = random_maps(4, case)

    def unfolded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return unfold_attention(query, key, value, KERNEL_SIZE).view_as(query)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return local_attention(query, key, value, KERNEL_SIZE, backend=backend)

    function = {'unfold': unfolded, 'local_attention': ours}.get(name)
    if name == 'flex':
        flex = FlexAttention(case.shape[-2:], case.device)
        inputs = [flex.sequence(m) for m in inputs]
        grad = flex.sequence(grad)
        torch.compiler.reset()  # shapes of earlier cases would count towards the recompile limit
        function = torch.compile(flex, dynamic=False)
    return tensor_step(function, inputs, grad, case)


class FlexAttention:
    """torch's FlexAttention over pixels, every query with a full neighbourhood.

    What differs from :func:`acmix_mm.ops.local_attention`: near the border the neighbourhood is
    moved inwards, not reflected; maps come as sequences (B, N, H W, d), in tiles of 8x16 pixels, so
    that one block of 128 queries needs few blocks of keys. The arithmetic asked for is the same.
    """

    BLOCK, TILE = 128, (8, 16)

    def __init__(self, size: tuple[int, int], device: str, kernel_size: int = KERNEL_SIZE):
        from torch.nn.attention.flex_attention import BlockMask

        self.size = height, width = size
        radius = kernel_size // 2
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
        tile_y, tile_x = (p // t for p, t in zip((y, x), self.TILE, strict=True))
        self.order = (tile_y * width + tile_x).flatten().argsort(stable=True)
        place = self.order.argsort().view(height, width)  # of a pixel in the sequence
        y, x = (p.flatten()[self.order] for p in (y, x))
        centre_y = y.clamp(radius, height - 1 - radius)
        centre_x = x.clamp(radius, width - 1 - radius)

        length = height * width
        blocks = -(-length // self.BLOCK)
        needed = torch.zeros(blocks, blocks, dtype=torch.bool)
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                keys = place[centre_y + dy, centre_x + dx]
                needed[torch.arange(length) // self.BLOCK, keys // self.BLOCK] = True
        self.order, needed = self.order.to(device), needed.to(device)
        y, x, centre_y, centre_x = (t.to(device) for t in (y, x, centre_y, centre_x))

        def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            rows = (centre_y[query] - y[key]).abs() <= radius
            return rows & ((centre_x[query] - x[key]).abs() <= radius)

        self.mask = BlockMask.from_kv_blocks(
            needed.sum(-1, dtype=torch.int32)[None, None],
            needed.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
            BLOCK_SIZE=self.BLOCK,
            mask_mod=near,
            seq_lengths=(length, length),
        )

    def sequence(self, maps: Tensor) -> Tensor:
        return maps.flatten(3)[..., self.order].transpose(2, 3).contiguous()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention(query, key, value, block_mask=self.mask)


def tensor_step(
    function: Callable[..., Tensor],
    inputs: list[Tensor],
    grad: Tensor,
    case: Case,
    layer: nn.Module | None = None,
) -> Step:
    """A step of a function of tensors; training sends ``grad`` back to inputs and parameters."""

    def run(inputs: list[Tensor], grad: Tensor) -> None:
        if case.train:
            function(*inputs).backward(grad)
        else:
            with torch.no_grad():
                function(*inputs)

    def small() -> None:
        *maps, end = (m.detach()[..., :8, :8].contiguous() for m in (*inputs, grad))
        run([m.requires_grad_(case.train) for m in maps], end)

    leaves = [] if layer is None else list(layer.parameters())
    leaves += [x.requires_grad_(case.train) for x in inputs]
    weights = 0 if layer is None else weight_bytes(layer)
    return Step(lambda: run(inputs, grad), small, leaves, weights)


def attention_cost(case: Case) -> dict[str, float]:
    """Operations and bytes that neighbourhood attention on (B, N, d, H, W) cannot do without.

    Forward: q k and w v, 4 k^2 C HW operations; query, key, value are read, the output is written.
    Training adds four products of the same size (gradients of weights, value, query, key), no
    recomputation; query, key, value and the output's gradient are read, three gradients written.
    """
    elements = math.prod(case.shape)
    return {
        'flops': (12 if case.train else 4) * KERNEL_SIZE**2 * elements,
        'bytes': (11 if case.train else 4) * elements * DTYPES[case.dtype].itemsize,
    }


def operator_cost(name: str, case: Case) -> dict[str, float]:
    """The same for a layer with C channels on (B, C, H, W): 18 C^2 HW operations for conv3x3.

    ACmix, 4 heads: 6 C^2 for the projections, 4 k^2 C for attention, and 2 * 9 * 12 C for the
    convolution path; training is three times as much. Forward reads and writes one map, training
    reads the input again and the output's gradient, and writes the input's.
    """
    channels, elements = case.shape[1], math.prod(case.shape)
    if name == 'conv3x3':
        operations = 18 * channels
    else:
        operations = 6 * channels + 4 * KERNEL_SIZE**2 + 2 * 9 * 12
    return {
        'flops': (3 if case.train else 1) * operations * elements,
        'bytes': (5 if case.train else 2) * elements * DTYPES[case.dtype].itemsize,
    }


# Whole models: weights are float32, other dtypes come by autocast.


def backbone_config(model: str) -> dict:
    """The backbone's config by its name in :data:`BACKBONES` or from a detector's config file.

    It is without what would load weights.
    """
    if model in BACKBONES:
        return dict(BACKBONES[model])
    return without_checkpoints(Config.fromfile(model).model.backbone.to_dict())


def detector_config(file: str) -> ConfigDict:
    """A config file's model, without what would load weights; initial values are enough here."""
    return ConfigDict(without_checkpoints(Config.fromfile(file).model.to_dict()))


def model_name(model: str) -> str:
    return model if model in BACKBONES else Path(model).stem


@functools.cache
def abilities(config_of: Callable[[str], dict], model: str) -> tuple[bool, bool]:
    """Whether layers of a model take a backend, and whether some have a form for inference.

    ``config_of`` is :func:`backbone_config` or :func:`detector_config`.
    """
    try:
        built = build_model(config_of(model))
    except Exception:  # as a candidate it fails again, and is reported
        return False, False
    modules = list(built.modules())
    return (
        any(hasattr(module, 'backend') for module in modules),
        any(isinstance(module, Deployable) for module in modules),
    )


def build_backbone(model: str, backend: str | None, form: str, case: Case) -> Step:
    """A backbone on images (B, 3, H, W); the loss is the sum of the means of its outputs.

    ``form`` is 'plain', 'deployed' or 'unfolded'.
    All of it trains: nothing is frozen, normalisation layers use the statistics of the batch.
    """
    backbone = build_model(backbone_config(model), backend)
    for module in backbone.modules():
        if hasattr(module, 'norm_eval'):
            module.norm_eval = False
        if hasattr(module, 'frozen_stages'):
            module.frozen_stages = -1
    backbone.requires_grad_().to(case.device).train(case.train)
    if form == 'deployed':
        deploy(backbone.eval())
    elif form == 'unfolded':
        unfold_operators(backbone)
    images = random_maps(1, Case(case.shape, case.train, 'float32', case.device))[0]

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


def build_detector(config: str, backend: str | None, case: Case) -> Step:
    """A detector on one image (height, width), with ten boxes (and masks) to train on."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    detector = build_model(detector_config(config), backend)
    MMLogger.get_current_instance().setLevel('WARNING')  # init_weights logs every parameter
    detector.init_weights()  # else scores start at 0.5 and suppression takes most of the time
    detector.to(case.device).train(case.train)

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


def model_step(model: nn.Module, data: dict, small: dict, case: Case) -> Step:
    """A detector's or segmenter's prediction, or its loss and gradients, for collated samples."""

    def run(data: dict) -> None:
        # A copy, for what the preprocessor and two-stage detectors do to samples.
        data = {**data, 'data_samples': [sample.clone() for sample in data['data_samples']]}
        data = model.data_preprocessor(data, case.train)
        if case.train:
            with autocast(case):
                loss, _ = model.parse_losses(model(**data, mode='loss'))
            loss.backward()
        else:
            with torch.no_grad(), autocast(case):
                model(**data, mode='predict')

    leaves = list(model.parameters())
    return Step(lambda: run(data), lambda: run(small), leaves, weight_bytes(model))


# Trained models on the data of their config.


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


def count_flops(function: Callable[[], object]) -> int:
    """Multiplications of convolutions, matrix products, attention and aggregation.

    One with its addition is one FLOP, as papers on vision models count.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2  # it counts additions too


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


def autocast(case: Case) -> torch.autocast:
    dtype = DTYPES[case.dtype]
    device_type = torch.device(case.device).type
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)
