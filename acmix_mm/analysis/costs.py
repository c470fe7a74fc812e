r"""What models compute: parameters and FLOPs, those of mixed operators also by stage.

A multiplication with its addition is one FLOP. Convolutions, matrix products, attention and
aggregation count; norms, activations, softmax, position encodings and pooling do not.

**Stages.** "On the Integration of Self-Attention and Convolution" (ACmix, CVPR 2022, section 3 and
Table 1) takes convolution and self-attention apart: Stage I projects by 1x1 convolutions, at a cost
of :math:`C^2` a pixel, Stage II shifts, weights and sums, at a cost of :math:`C`. With C channels
in and out, a kernel of side :math:`k_c`, an attention window of side :math:`k_a` and N heads of
dimension d = C / N, a pixel costs

=================  =======================  ====================================================
                   Stage I                  Stage II
=================  =======================  ====================================================
convolution        :math:`k_c^2 C^2`        :math:`k_c^2 C`, additions of shifted maps
self-attention     :math:`3 C^2`            :math:`2 k_a^2 C`, logits and weighted sum
ACmix              :math:`3 C^2`            :math:`2 k_a^2 C` and, for the convolution path,
                                            :math:`3 k_c^2 C` (``fc``) :math:`+ k_c^4 C` (shifts)
=================  =======================  ====================================================

Weights are as many as Stage I costs; Stage II of ACmix has :math:`3 N k_c^2 + k_c^4 C` more. The
projections have biases here, 3 C.

What the layers of this package compute is that, but for the following:

* **Stride s.** The projections are those of the full map, and so is ``fc`` where it is a step of
  its own; all else is computed for the output's pixels, and so is the whole of a plain convolution.
* **Folding.** Where it costs no more, the convolution path is one convolution of the M = 3 N maps
  (see :class:`~acmix_mm.layers.mixing_weights.MixingWeights`): :math:`k_c^2 M C` an output, and
  :math:`k_c^4 M C` once a forward pass to fold the weights, which a deployed layer has behind it.
  ``fc``'s bias in Swin-ACmix is folded too: :math:`k_c^4 C` for the weights,
  :math:`k_c C H (k_c + W)` for the map of what it adds near the borders. The two steps of the paper
  are told beside it.
* **Forms of the shift.** With fewer kernels than outputs, :math:`k_c^4 C` is for those that there
  are, and folded kernels are multiplied out to one for each output only where both paths are one
  operator. Shifts of tensors are additions, which count nothing.
* **Position encoding.** ``k - conv_p (x, y)`` is no product of maps and counts nothing; its 2 d
  parameters belong to the attention path. So do Swin's table of relative positions and rate1;
  rate2 and the output's bias belong to the convolution path, if there is one.
* **Groups** of an :class:`~acmix_mm.layers.ACmix`'s projections save parameters, not FLOPs.
* **SAN-ACmix.** R channels each for query and key and 4 R = C for value are projected from C_in:
  Stage I is :math:`6 R C_{in}`. The network that makes the weights from query and patch, with
  G = C / 8 weights a position, is of the attention path, as it takes the place of logits and
  softmax: :math:`R (1 + k_a^2) G + G^2 k_a^2`, and :math:`k_a^2 C` for the sum. M is 6, d is R.
* **PVT-ACmix.** The attention path has keys and values of a map reduced by r on each side, with T
  pixels, the convolution path those of the full map. All projections are Stage I,
  :math:`3 C^2 HW + 2 C^2 T` (the latter where r > 1; with the attention path alone,
  :math:`C^2 HW + 2 C^2 T`). What only attention needs beyond them is of its path: the reduction
  :math:`r^2 C^2 T`, :math:`2 C T HW`, and the output projection :math:`C^2 HW`.
* **Swin-ACmix.** :math:`k_a^2` is the number of pixels of a window, the map is padded to windows.
  The output projection, :math:`C^2` a pixel, is of the attention path, which alone it is applied
  to; the paper's Stage I is the projections that both paths share.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..layers import ACmix, MixedOperator, PatchACmix, SpatialReductionACmix, WindowACmix
from ..layers.patch_attention import SHARE_CHANNELS
from ..ops._checks import check_positive


def count_flops(function: Callable[[], object]) -> int:
    """Multiplications of convolutions, matrix products, attention and aggregation.

    One with its addition is one FLOP, as papers on vision models count.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return _products(counter)


def _products(counter: FlopCounterMode) -> int:
    return counter.get_total_flops() // 2  # it counts additions too


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of a forward pass."""

    parameters: int = 0
    flops: int = 0

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(self.parameters + other.parameters, self.flops + other.flops)

    def __sub__(self, other: 'Cost') -> 'Cost':
        return Cost(self.parameters - other.parameters, self.flops - other.flops)


@dataclass(frozen=True)
class Stages:
    """Cost of an operator, or of several, by stage; see the module's docstring."""

    projection: Cost = Cost()  # Stage I
    attention: Cost = Cost()  # Stage II, attention path
    convolution: Cost = Cost()  # Stage II, convolution path

    def __add__(self, other: 'Stages') -> 'Stages':
        return Stages(
            self.projection + other.projection,
            self.attention + other.attention,
            self.convolution + other.convolution,
        )

    @property
    def total(self) -> Cost:
        return self.projection + self.attention + self.convolution

    @property
    def projection_share(self) -> float:
        """Stage I's part of the FLOPs; NaN where there are none."""
        flops = self.total.flops
        return self.projection.flops / flops if flops else math.nan


@dataclass(frozen=True)
class OperatorCosts:
    """A mixed operator, beside what could stand in its place.

    Args:
        name (str): Of the module in the model.
        kind (str): Of its class.
        channels (tuple[int, int]): In and out.
        stride (int): From input to output.
        maps (tuple[tuple[int, int], ...]): Height and width of its input, for each call.
        mixed (Stages): The operator as it is computed.
        two_steps (Stages): The same with ``fc`` and shift convolution one after the other, as the
            paper formulates it. Parameters are those of the layer.
        convolution (Stages | None): A plain convolution with the same channels, stride and kernel.
            FLOPs of its Stage II, in ``convolution``, are additions. None without a convolution
            path, which would tell the kernel.
        self_attention (Stages | None): The attention path alone, as with ``mix='attention'``. None
            without an attention path.
        self_attention_at_output (Stages | None): The same with Stage I, too, for the pixels of the
            output only: the paper's formulas have one size for both stages.
        counted (int): FLOPs of the operator by PyTorch's counter: those of ``mixed``, unless a
            subclass computes otherwise.
    """

    name: str
    kind: str
    channels: tuple[int, int]
    stride: int
    maps: tuple[tuple[int, int], ...]
    mixed: Stages
    two_steps: Stages
    convolution: Stages | None
    self_attention: Stages | None
    self_attention_at_output: Stages | None
    counted: int


@dataclass(frozen=True)
class NetworkCosts:
    """A network, and its mixed operators.

    Args:
        whole (Cost): The network.
        backbone (Cost | None): Its ``backbone``, if it has one.
        image (tuple[int, int]): Height and width of the image as the network gets it.
        operators (tuple[OperatorCosts, ...]): In the order of the model's modules.
    """

    whole: Cost
    backbone: Cost | None
    image: tuple[int, int]
    operators: tuple[OperatorCosts, ...]

    def stages(self, form: str) -> Stages | None:
        """Sum over the operators in one of their forms, an attribute of :class:`OperatorCosts`.

        None if one of them does not have it.
        """
        forms = [getattr(operator, form) for operator in self.operators]
        return None if None in forms else sum(forms, Stages())

    def mean_projection_share(self, form: str) -> float | None:
        """Mean of Stage I's part in the FLOPs of each operator that is called; None as above."""
        forms = [getattr(operator, form) for operator in self.operators if operator.maps]
        if None in forms:
            return None
        return sum(stages.projection_share for stages in forms) / len(forms) if forms else math.nan

    def whole_with(self, form: str) -> Cost | None:
        """The network with all operators in this form; None as above.

        The additions of plain convolutions are not counted here, as in all other convolutions.
        """
        stages = self.stages(form)
        if stages is None:
            return None
        new = stages.projection if form == 'convolution' else stages.total
        return self.whole - self.stages('mixed').total + new


def network_costs(model: nn.Module, images: Tensor | tuple[int, int]) -> NetworkCosts:
    """Parameters and FLOPs of a network in inference, and of its mixed operators by stage.

    The network is run once, in evaluation mode without gradients; modes stay as they were.

    Args:
        model (nn.Module): Any; for OpenMMLab's see :func:`prediction`.
        images (Tensor | tuple[int, int]): What the model is called with, (B, C, H, W), or height
            and width of one image with 3 channels.

    Returns:
        NetworkCosts: FLOPs are those of the whole batch.

    Raises:
        ValueError: If a size is not of integers above 0, or a mixed operator is not of this
            package's classes or a subclass.
    """
    function = model
    if not isinstance(images, Tensor):
        function, images = prediction(model, images)
    names = {m: name for name, m in model.named_modules() if isinstance(m, MixedOperator)}
    forms = {operator: _closed_form(operator, name) for operator, name in names.items()}
    backbone = getattr(model, 'backbone', None)
    watched = [*names] if backbone is None else [*names, backbone]
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            torch.no_grad(),
            FlopCounterMode(display=False) as counter,
            noting_calls(watched, counter) as calls,
        ):
            function(images)
    finally:
        for module, mode in training.items():
            module.training = mode
    with torch.no_grad():
        operators = tuple(_operator_costs(m, names[m], form, calls[m]) for m, form in forms.items())
    return NetworkCosts(
        Cost(_parameters(model), _products(counter)),
        None
        if backbone is None
        else Cost(_parameters(backbone), sum(call.flops for call in calls[backbone])),
        tuple(images.shape[-2:]),
        operators,
    )


def prediction(
    model: nn.Module, size: tuple[int, int]
) -> tuple[Callable[[Tensor], object], Tensor]:
    """What a model computes for one image in inference, and a random image for it.

    OpenMMLab's models get what their preprocessor makes of the image, padded for example, in the
    mode 'tensor': what follows on the heads' outputs is left out. Two-stage detectors see as many
    region proposals as they let through, fewer on small images, where there are not as many, and
    100 masks.

    Args:
        model (nn.Module): Any that takes images (B, 3, H, W), or one of OpenMMLab's.
        size (tuple[int, int]): Height and width of the image.

    Returns:
        tuple[Callable[[Tensor], object], Tensor]: A function of images, and one, (1, 3, H, W).

    Raises:
        ValueError: If a size is not of integers above 0.
    """
    for name, value in zip(('height', 'width'), size, strict=True):
        check_positive(name, value)
    if not hasattr(model, 'data_preprocessor'):
        parameter = next(model.parameters(), torch.empty(0))
        return model, torch.rand(1, 3, *size, dtype=parameter.dtype, device=parameter.device)
    data = {'inputs': [torch.randint(0, 256, (3, *size), dtype=torch.uint8)]}
    if hasattr(model, 'bbox_head') or hasattr(model, 'roi_head'):
        from mmdet.structures import DetDataSample

        meta = {'img_shape': size, 'ori_shape': size, 'scale_factor': (1.0, 1.0)}
        data['data_samples'] = [DetDataSample(metainfo=meta)]
    data = model.data_preprocessor(data)

    def predict(images: Tensor) -> object:
        with _limited_masks(model):
            return model(images, data_samples=data.get('data_samples'), mode='tensor')

    return predict, data['inputs']


@contextmanager
def _limited_masks(model: nn.Module) -> Iterator[None]:
    """Context in which a cascade's mask heads see 100 regions, as mmdet's Mask R-CNN has it."""
    head = getattr(model, 'roi_head', None)
    if not hasattr(head, 'num_stages'):
        yield
        return
    forward = head._mask_forward

    def limited(stage: int, x: tuple[Tensor, ...], rois: Tensor) -> dict[str, Tensor]:
        results = forward(stage, x, rois[:100])
        # What follows splits as many by image.
        results['mask_preds'] = results['mask_preds'][:1, :1].expand(len(rois), -1, -1, -1)
        return results

    head._mask_forward = limited
    try:
        yield
    finally:
        del head._mask_forward


# Calls.


class Map(NamedTuple):
    """A map that an operator gets: batch, height and width."""

    batch: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        return math.prod(self)

    def strided(self, stride: int) -> 'Map':
        """The map of which every ``stride``-th pixel is taken."""
        return Map(self.batch, -(-self.height // stride), -(-self.width // stride))

    def reduced(self, ratio: int) -> 'Map':
        """The map of whole patches of ``ratio`` times ``ratio`` pixels."""
        return Map(self.batch, self.height // ratio, self.width // ratio)


class Call(NamedTuple):
    """A call of a module: the map it gets, if it is a mixed operator, and FLOPs by the counter."""

    map: Map | None
    flops: int


@contextmanager
def noting_calls(
    modules: Iterable[nn.Module], counter: FlopCounterMode
) -> Iterator[dict[nn.Module, list[Call]]]:
    """Context in which the calls of modules are noted, while the counter is active."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}
    before: dict[nn.Module, int] = {}

    def begin(module: nn.Module, args: tuple) -> None:
        before[module] = _products(counter)

    def end(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        maps = _map(module, **given) if isinstance(module, MixedOperator) else None
        calls[module].append(Call(maps, _products(counter) - before[module]))

    handles = [module.register_forward_pre_hook(begin) for module in calls]
    handles += [module.register_forward_hook(end, with_kwargs=True) for module in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _map(operator: MixedOperator, x: Tensor, hw_shape: tuple[int, int] = (), **_) -> Map:
    if hw_shape:
        return Map(len(x), *hw_shape)
    return Map(*x.shape[:3]) if isinstance(operator, WindowACmix) else Map(len(x), *x.shape[2:])


# Closed forms; the module's docstring explains them.


@dataclass(frozen=True)
class ClosedForm:
    """What is particular to a kind of mixed operator.

    Args:
        channels (tuple[int, int]): In and out.
        projected (int): Channels of query, key and value together.
        attention (Callable[[Map, Map], int]): FLOPs of the attention path by the operator's input
            and output.
        stride (int): From input to output. Default: 1.
        groups (int): Of the projections' parameters. Default: 1.
        reduction (int): Side of the patches that keys and values of the attention path are reduced
            from. Default: 1.
    """

    channels: tuple[int, int]
    projected: int
    attention: Callable[[Map, Map], int]
    stride: int = 1
    groups: int = 1
    reduction: int = 1

    def projection(self, maps: Map, attention: bool, convolution: bool) -> int:
        """FLOPs of Stage I for the paths that there are."""
        channels = self.projected * maps.pixels
        if attention and self.reduction > 1:
            keys_and_values = self.projected - self.channels[1]
            channels -= 0 if convolution else keys_and_values * maps.pixels
            channels += keys_and_values * maps.reduced(self.reduction).pixels
        return self.channels[0] * channels


def _acmix(layer: ACmix) -> ClosedForm:
    outputs = layer.out_channels
    return ClosedForm(
        (layer.in_channels, outputs),
        3 * outputs,
        lambda maps, out: 2 * layer.attn_kernel_size**2 * outputs * out.pixels,
        layer.stride[0],
        layer.groups,
    )


def _patch_acmix(layer: PatchACmix) -> ClosedForm:
    reduced, outputs = layer.conv1.out_channels, layer.conv3.out_channels
    area, weights = layer.attn_kernel_size**2, outputs // SHARE_CHANNELS
    network = reduced * (1 + area) * weights + weights**2 * area
    return ClosedForm(
        (layer.conv1.in_channels, outputs),
        2 * reduced + outputs,
        lambda maps, out: (network + area * outputs) * maps.pixels,
    )


def _spatial_reduction_acmix(layer: SpatialReductionACmix) -> ClosedForm:
    channels, ratio = layer.embed_dims, layer.sr_ratio

    def attention(maps: Map, out: Map) -> int:
        keys = maps.reduced(ratio)
        reduction = (channels * ratio) ** 2 * keys.pixels if ratio > 1 else 0
        logits_and_sum = 2 * channels * keys.height * keys.width * maps.pixels
        return reduction + logits_and_sum + channels**2 * maps.pixels

    return ClosedForm((channels, channels), 3 * channels, attention, reduction=ratio)


def _window_acmix(layer: WindowACmix) -> ClosedForm:
    channels, area = layer.embed_dims, math.prod(layer.window_size)
    return ClosedForm(
        (channels, channels),
        3 * channels,
        lambda maps, out: (2 * area * channels + channels**2) * maps.pixels,
    )


CLOSED_FORMS = {
    ACmix: _acmix,
    PatchACmix: _patch_acmix,
    SpatialReductionACmix: _spatial_reduction_acmix,
    WindowACmix: _window_acmix,
}


def _closed_form(layer: MixedOperator, name: str) -> ClosedForm:
    for kind, make in CLOSED_FORMS.items():
        if isinstance(layer, kind):
            return make(layer)
    kinds = ', '.join(kind.__name__ for kind in CLOSED_FORMS)
    raise ValueError(
        f'model must have mixed operators of the kinds {kinds}, got {type(layer).__name__} as '
        f'{name!r}'
    )


def _convolution_path(layer: MixedOperator, maps: Map, out: Map) -> tuple[int, int]:
    """FLOPs of the convolution path as it is computed, and in the paper's two steps."""
    weights = layer.mixing_weights()
    if weights.kernel is None:
        return 0, 0
    folded = weights.fc is None
    channels, kernel_size = weights.kernel.size(0), weights.kernel.size(-1)
    num_maps = (weights.kernel if folded else weights.fc).size(1)
    positions, num_kernels = kernel_size**2, layer.kernel_groups * layer.head_dim
    two_steps = positions * num_maps * weights.groups * maps.pixels
    if layer.shift != 'tensor':
        two_steps += positions**2 * num_kernels * out.pixels
    if not folded:
        return two_steps, two_steps
    with_bias = weights.fc_bias is not None
    flops = positions * num_maps * channels * out.pixels
    if not layer.deployed:
        flops += positions**2 * (num_maps + with_bias) * num_kernels
    if with_bias:
        flops += kernel_size * channels * out.height * (kernel_size + out.width)
    return flops, two_steps


# Names of parameters, or of the modules that they belong to, in both forms of a layer.
STAGE_1 = ('conv1', 'conv2', 'conv3', 'weight', 'weight_bias', 'qkv')
CONVOLUTION_PATH = ('fc', 'fc_bias', 'dep_conv', 'kernel', 'rate2', 'bias')
ATTENTION_RATE = ('rate1', 'scale')


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _operator_costs(
    layer: MixedOperator, name: str, form: ClosedForm, calls: list[Call]
) -> OperatorCosts:
    weights = layer.mixing_weights()
    paths = (layer.with_attention, layer.with_convolution)
    sizes = [(call.map, call.map.strided(form.stride)) for call in calls]

    parameters = {'projection': 0, 'attention': 0, 'convolution': 0, 'rate': 0}
    for parameter_name, parameter in layer.named_parameters():
        part = parameter_name.partition('.')[0]
        if part in STAGE_1 or parameter_name.startswith('attn.in_proj_'):
            stage = 'projection'
        elif part in CONVOLUTION_PATH and layer.with_convolution:
            stage = 'convolution'
        else:
            stage = 'rate' if part in ATTENTION_RATE else 'attention'
        parameters[stage] += parameter.numel()
    bias = 0 if layer.bias is None else layer.bias.numel()

    projection = Cost(
        parameters['projection'], sum(form.projection(maps, *paths) for maps, _ in sizes)
    )
    path = Cost(parameters['attention'], sum(form.attention(*size) for size in sizes))
    attention = path + Cost(parameters['rate']) if layer.with_attention else Cost()
    own, two_steps = (
        Cost(parameters['convolution'], sum(flops))
        for flops in zip(
            (0, 0),
            *(_convolution_path(layer, *size) for size in sizes),
            strict=True,
        )
    )

    self_attention = at_output = convolution = None
    if layer.with_attention:
        path += Cost(bias if layer.with_convolution else 0)
        alone, of_outputs = (
            Cost(parameters['projection'], sum(form.projection(m, True, False) for m in maps))
            for maps in ([maps for maps, _ in sizes], [out for _, out in sizes])
        )
        self_attention, at_output = Stages(alone, path), Stages(of_outputs, path)
    if layer.with_convolution:
        positions = weights.kernel.size(-1) ** 2
        fan_in, outputs = positions * form.channels[0] // form.groups, form.channels[1]
        pixels = sum(out.pixels for _, out in sizes)
        convolution = Stages(
            Cost(fan_in * outputs + bias, fan_in * outputs * pixels),
            convolution=Cost(0, positions * outputs * pixels),
        )
    return OperatorCosts(
        name,
        type(layer).__name__,
        form.channels,
        form.stride,
        tuple((maps.height, maps.width) for maps, _ in sizes),
        Stages(projection, attention, own),
        Stages(projection, attention, two_steps),
        convolution,
        self_attention,
        at_output,
        sum(call.flops for call in calls),
    )
