"""Steps of the layer ACmix and of its two paths, and what they cannot do without."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..layers import ACmix, MixedOperator
from ..models import deploy
from ..ops import group_conv, local_aggregation, local_attention, patch_weights
from ..ops.reference import tolerance
from .baselines import NATTEN, FlexAttention, UnfoldACmix, unfold_attention
from .steps import DTYPES, Case, Step, random_maps, tensor_step

KERNEL_SIZE = 7  # of the neighbourhoods
RIVALS = {'FlexAttention': FlexAttention, 'NATTEN': NATTEN}  # other packages' attention

# How the convolution path shifts: options of the operator, and whether ``fc`` is multiplied into
# the kernels.
SHIFT_FORMS = {
    'tensor shifts': ({'shift': 'tensor'}, False),
    'fixed kernels': ({'shift': 'fixed'}, False),
    'fixed kernels, folded': ({'shift': 'fixed'}, True),
    'one kernel group': ({'kernel_groups': 1}, False),
    'learned kernels': ({}, False),
    'learned kernels, folded': ({}, True),
}


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


def build_part(name: str, backend: str | None, case: Case) -> Step:
    """An operator that GPUs have kernels of, for a layer on a map (B, C, H, W).

    'group_conv' of four heads, with channels last, as the layer ACmix calls it; of SAN,
    'local_aggregation' of a map whose eight channels share weights, and the 'patch_weights' for it.
    """
    batch, channels, *size = case.shape
    if name == 'patch_weights':
        return _build_patch_weights(backend, case)
    if name == 'group_conv':
        shapes = ((batch, channels // 4, 12, *size), (channels, 12, 3, 3))
        function = functools.partial(group_conv, backend=backend)
    else:
        shapes = (case.shape, (batch, channels // 8, KERNEL_SIZE**2, *size))
        function = functools.partial(local_aggregation, backend=backend)
    inputs = [*random_maps(1, case, shapes[0]), *random_maps(1, case, shapes[1])]
    (grad,) = random_maps(1, case)
    if name == 'group_conv':
        inputs[0] = inputs[0].flatten(1, 2).contiguous(memory_format=torch.channels_last)
        inputs[0] = inputs[0].unflatten(1, (-1, 12))
        grad = grad.contiguous(memory_format=torch.channels_last)
    return tensor_step(function, inputs, grad, case)


def _build_patch_weights(backend: str | None, case: Case) -> Step:
    """Query and key have a fourth, hidden weights an eighth of a map's channels in SAN."""
    batch, channels, *size = case.shape
    norm = nn.BatchNorm2d(channels // 4 * (1 + KERNEL_SIZE**2))
    norm.to(case.device, DTYPES[case.dtype]).train(case.train)
    inputs = random_maps(2, case, (batch, channels // 4, *size))
    inputs += random_maps(1, case, (channels // 8, norm.num_features, 1, 1))
    (grad,) = random_maps(1, case, (batch, channels // 8, *size))

    def function(query: Tensor, key: Tensor, weight: Tensor) -> Tensor:
        return patch_weights(query, key, weight, norm, KERNEL_SIZE, backend=backend)

    return tensor_step(function, inputs, grad, case, norm)


def build_attention(name: str, backend: str | None, case: Case) -> Step:
    """Neighbourhood attention on (B, N, d, H, W), once it has given the same as ours.

    ``name`` is 'local_attention', 'unfold' or one of :data:`RIVALS`, which get maps in their own
    order; making that is not part of the step.

    Raises:
        Unavailable: If this machine has no such attention.
        ArithmeticError: If results or gradients differ from ours by more than rounding.
    """

    def unfolded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return unfold_attention(query, key, value, KERNEL_SIZE).view_as(query)

    def unchanged(maps: Tensor) -> Tensor:
        return maps

    arrange = restore = unchanged
    if name in RIVALS:
        function = RIVALS[name](case, KERNEL_SIZE)
        arrange, restore = function.arrange, function.restore
    else:
        ours = functools.partial(local_attention, kernel_size=KERNEL_SIZE, backend=backend)
        function = {'unfold': unfolded, 'local_attention': ours}[name]
    maps = random_maps(4, case)
    arranged = [arrange(m) for m in maps]
    expected = _results(functools.partial(local_attention, kernel_size=KERNEL_SIZE), maps, case)
    found = [restore(tensor) for tensor in _results(function, arranged, case)]
    _check_equal(found, expected, case)
    *inputs, grad = arranged
    return tensor_step(function, inputs, grad, case, crops=name not in RIVALS)


def _results(function: Callable[..., Tensor], tensors: list[Tensor], case: Case) -> list[Tensor]:
    """The result for query, key and value, in training also their gradients for the fourth."""
    *inputs, grad = (tensor.detach() for tensor in tensors)
    if not case.train:
        with torch.no_grad():
            return [function(*inputs)]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def _check_equal(found: list[Tensor], expected: list[Tensor], case: Case) -> None:
    # On GPUs, others may multiply float32 as TF32, which has the digits of float16.
    tf32 = case.device != 'cpu' and case.dtype == 'float32'
    dtype = torch.float16 if tf32 else DTYPES[case.dtype]
    for tensor, exact in zip(found, expected, strict=True):
        allowed = tolerance(dtype, KERNEL_SIZE**2, exact.abs().max().item())
        error = (tensor.double() - exact.double()).abs().max().item()
        if not error <= allowed:
            raise ArithmeticError(
                f'results must be those of local_attention within {allowed:.1e}, differ by '
                f'{error:.1e}'
            )


class ConvolutionPath(MixedOperator):
    """The convolution path alone: ``fc``, then shift and sum of what it makes."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, d, 3 N, H, W) -> (B, N d, H, W)."""
        return self.mixing_weights().mix(maps, None, self.backend)


def build_convolution_path(form: str, backend: str | None, case: Case) -> Step:
    """The convolution path, of projected maps, for a case of shape (B, N, d, H, W).

    ``form`` is one of :data:`SHIFT_FORMS`, or 'deployed': learned kernels, folded for inference
    where that pays.
    """
    batch, heads, dim, *size = case.shape
    options, folds = SHIFT_FORMS.get(form, ({}, None))
    torch.manual_seed(0)  # equal weights in all forms
    path = ConvolutionPath(heads * dim, 3 * heads, dim, mix='conv', backend=backend, **options)
    (maps,) = random_maps(1, case, (batch, dim, 3 * heads, *size))
    (grad,) = random_maps(1, case, (batch, heads * dim, *size))
    return _shift_step(path, folds, maps, grad, case)


def build_shift_layer(form: str, num_heads: int, backend: str | None, case: Case) -> Step:
    """The layer ACmix on a map (B, C, H, W), see :func:`build_convolution_path`."""
    options, folds = SHIFT_FORMS.get(form, ({}, None))
    channels = case.shape[1]
    torch.manual_seed(0)
    layer = ACmix(channels, channels, num_heads=num_heads, backend=backend, **options)
    return _shift_step(layer, folds, *random_maps(2, case), case)


def _shift_step(
    operator: MixedOperator, folds: bool | None, inputs: Tensor, grad: Tensor, case: Case
) -> Step:
    operator.to(case.device, DTYPES[case.dtype]).train(case.train)
    if folds is None:
        deploy(operator.eval())
    else:
        operator.folds = folds
    return tensor_step(operator, [inputs], grad, case, operator)


def attention_cost(case: Case) -> dict[str, float]:
    """Operations and bytes that neighbourhood attention on (B, N, d, H, W) cannot do without.

    Forward: q k and w v, 4 k^2 C HW operations; query, key, value are read, the output is written.
    Training adds four products of the same size (gradients of weights, value, query, key), no
    recomputation; query, key, value and the output's gradient are read, three gradients written.
    """
    elements = math.prod(case.shape)
    operations = (12 if case.train else 4) * KERNEL_SIZE**2 * elements
    return {
        'flops': operations,
        'attention_flops': operations,
        'bytes': (11 if case.train else 4) * elements * DTYPES[case.dtype].itemsize,
    }


def operator_cost(name: str, case: Case) -> dict[str, float]:
    """The same for a layer with C channels on (B, C, H, W): 18 C^2 HW operations for conv3x3.

    ACmix, 4 heads: 6 C^2 for the projections, 4 k^2 C for attention, and 2 * 9 * 12 C for the
    convolution path; training is three times as much. Forward reads and writes one map, training
    reads the input again and the output's gradient, and writes the input's.
    """
    channels, elements = case.shape[1], math.prod(case.shape)
    attention = 0 if name == 'conv3x3' else 4 * KERNEL_SIZE**2
    others = 18 * channels if name == 'conv3x3' else 6 * channels + 2 * 9 * 12
    passes = 3 if case.train else 1
    return {
        'flops': passes * (attention + others) * elements,
        'attention_flops': passes * attention * elements,
        'bytes': (5 if case.train else 2) * elements * DTYPES[case.dtype].itemsize,
    }
