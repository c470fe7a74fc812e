"""Steps of the layer ACmix and of its two paths, and what they cannot do without."""

import math

import torch
from torch import Tensor, nn

from ..layers import ACmix, MixedOperator
from ..models import deploy
from ..ops import local_attention
from .baselines import FlexAttention, UnfoldACmix, unfold_attention
from .steps import DTYPES, Case, Step, random_maps, tensor_step

KERNEL_SIZE = 7  # of the neighbourhoods

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
