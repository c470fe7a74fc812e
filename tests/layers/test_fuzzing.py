"""Layers of any arguments, on maps of any shape, layout and dtype, trained, deployed, exported."""

import contextlib
import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from fuzzing import LAYOUTS, TOLERANCES, assert_close, fuzz, fuzzed, layouts
from hypothesis import strategies as st
from torch import Tensor, nn

import acmix_mm
from acmix_mm.layers import ACmix, DepthwiseBlock, PatchACmix, PatchAttention, XVolution
from acmix_mm.layers.mixed_operator import MIX_MODES, SHIFTS
from acmix_mm.ops import available_backends

few, odd, steps = st.integers(1, 3), st.sampled_from([1, 3, 5]), st.sampled_from([1, 1, 2, 3, 50])
sides = st.sampled_from([1, 2, 3, 5, 8, 17])
mixes = st.sampled_from(MIX_MODES)
backends = st.sampled_from([None, *(b for b in available_backends() if b != 'triton')])


def draw_shift(data, outputs: int) -> dict:
    """Options of the convolution path, for so many outputs of a head position."""
    divisors = [n for n in range(1, outputs + 1) if outputs % n == 0]
    shift = data.draw(st.sampled_from(SHIFTS))
    constant = shift in ('fixed', 'tensor')
    groups = data.draw(st.sampled_from([None] if constant else [None, *divisors]))
    return {'shift': shift, 'kernel_groups': groups}


def draw_acmix(data):
    heads, groups = data.draw(few), data.draw(few)
    out = heads * groups * data.draw(few)
    layer = ACmix(
        groups * data.draw(few), out, data.draw(odd), data.draw(steps), dilation=data.draw(steps),
        groups=groups, bias=data.draw(st.booleans()), num_heads=heads,
        attn_kernel_size=data.draw(odd), mix=data.draw(mixes), backend=data.draw(backends),
        **draw_shift(data, heads),
    )  # fmt: skip
    return layer, layer.in_channels


def draw_x_volution(data):
    heads, groups = data.draw(few), data.draw(few)
    layer = XVolution(
        groups * data.draw(few), heads * groups, data.draw(odd), data.draw(steps),
        dilation=data.draw(st.integers(1, 9)), groups=groups,
        attention=data.draw(st.sampled_from(['pixel_shift', 'local'])), shift=data.draw(few),
        num_steps=data.draw(few), num_heads=heads, attn_kernel_size=data.draw(odd),
        backend=data.draw(backends),
    )  # fmt: skip
    return layer, layer.in_channels


def draw_patch_attention(data):
    arguments = data.draw(few), 8 * data.draw(few), data.draw(few), data.draw(odd)
    return PatchAttention(*arguments, backend=data.draw(backends)), arguments[0]


def draw_patch_acmix(data):
    inputs, qk = data.draw(few), 2 * data.draw(few)
    layer = PatchACmix(
        inputs, 4 * qk, qk, data.draw(odd), data.draw(odd), data.draw(mixes), data.draw(backends),
        **draw_shift(data, 4),
    )  # fmt: skip
    return layer, inputs


def draw_depthwise(data):
    dynamic = data.draw(st.sampled_from([None, 'homogeneous', 'inhomogeneous']))
    channels = 32 if dynamic == 'inhomogeneous' else data.draw(st.integers(4, 9))
    return DepthwiseBlock(channels, data.draw(odd), dynamic), channels


def draw_window_acmix(data):
    swin = pytest.importorskip('mmdet.models.backbones.swin')
    heads = data.draw(few)
    attention = swin.WindowMSA(heads * data.draw(few), heads, (data.draw(few), data.draw(few)))
    backend, mix = data.draw(backends), data.draw(mixes)
    options = {'mix': mix, 'backend': backend, **draw_shift(data, heads)}
    layer = acmix_mm.layers.WindowACmix(attention, data.draw(odd), **options)
    return layer, layer.embed_dims


def draw_spatial_reduction_acmix(data):
    pvt = pytest.importorskip('mmdet.models.backbones.pvt')
    heads = data.draw(few)
    ratio = data.draw(st.sampled_from([1, 2]))
    attention = pvt.SpatialReductionAttention(heads * data.draw(few), heads, sr_ratio=ratio)
    backend, mix = data.draw(backends), data.draw(mixes)
    options = {'mix': mix, 'backend': backend, **draw_shift(data, heads)}
    layer = acmix_mm.layers.SpatialReductionACmix(attention, data.draw(odd), **options)
    return layer, layer.embed_dims


LAYERS = {
    'ACmix': draw_acmix,
    'XVolution': draw_x_volution,
    'PatchAttention': draw_patch_attention,
    'PatchACmix': draw_patch_acmix,
    'DepthwiseBlock': draw_depthwise,
    'WindowACmix': draw_window_acmix,
    'SpatialReductionACmix': draw_spatial_reduction_acmix,
}


def draw_input(data, name: str, layer: nn.Module, channels: int) -> tuple:
    """Arguments of the forward pass, in float64, and batches of 0 and pixels of 1 among them."""
    batch = data.draw(st.sampled_from([2, 1, 3, 0]))
    height, width = data.draw(sides), data.draw(sides)
    if name == 'WindowACmix':
        rows, columns = layer.window_size
        shape = (batch, rows * min(height, 3), columns * min(width, 3), channels)
    elif name == 'SpatialReductionACmix':
        height, width = max(height, layer.sr_ratio), max(width, layer.sr_ratio)
        shape = (batch, height * width, channels)
    else:
        shape = (batch, channels, height, width)
    x = torch.randn(shape, dtype=torch.float64)
    return (x, (height, width)) if name == 'SpatialReductionACmix' else (x,)


def randomise(layer: nn.Module) -> nn.Module:
    """Weights of no special values, statistics of batch norms included."""
    for norm in layer.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def outcome(layer: nn.Module, x: Tensor, rest: tuple, grad_seed: int) -> list[Tensor]:
    """Result and gradients of input and parameters."""
    leaves = [x.requires_grad_(), *layer.requires_grad_().parameters()]
    out = layer(x, *rest)
    generator = torch.Generator().manual_seed(grad_seed)
    grad = torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad, allow_unused=True)]


def onednn_is_right(layer: nn.Module, dtype: torch.dtype, width: int) -> bool:
    """Not for one column of outputs of a strided convolution in bfloat16, on CPUs with AMX.

    See docs/troubleshooting.md; PyTorch has another computation for them.
    """
    return dtype != torch.bfloat16 or not any(
        isinstance(conv, nn.Conv2d)
        and conv.stride[1] > 1
        and width + 2 * conv.padding[1] - conv.dilation[1] * (conv.kernel_size[1] - 1) - 1
        < conv.stride[1]
        for conv in layer.modules()
    )


@fuzzed(8, 100)
@pytest.mark.parametrize('name', LAYERS)
def test_right_for_anything(name, examples, campaign):
    """As the same layer by plain PyTorch in float64, of contiguous maps, and as it is deployed.

    That this is right is what the other tests of the layers show.
    """

    def check(data):
        layer, channels = LAYERS[name](data)
        layer = randomise(layer).double()
        x, *rest = draw_input(data, name, layer, channels)
        dtype = data.draw(st.sampled_from(list(TOLERANCES)))
        # Batch statistics of few rounded numbers are badly posed, and so are gradients of a ReLU.
        exactly = dtype == torch.float64
        layer.train(exactly and data.draw(st.booleans(), label='training'))
        ours = copy.deepcopy(layer).to(dtype)
        laid_out = LAYOUTS[data.draw(layouts)](x.to(dtype))
        plain = acmix_mm.set_backend(ours, 'torch') if data.draw(st.booleans()) else ours
        exact = acmix_mm.set_backend(copy.deepcopy(plain).double(), 'torch')
        copied = laid_out.detach().double().contiguous()
        try:
            expected = outcome(exact, copied, rest, 0)
        except ValueError:
            with pytest.raises(ValueError, match='more than 1 value per channel'):
                ours(laid_out, *rest)
            return
        width = rest[0][1] if rest else x.size(-1)
        right = onednn_is_right(ours, dtype, width)
        context = contextlib.nullcontext if right else torch.backends.mkldnn.flags  # without it
        with context():
            results = outcome(ours, laid_out, rest, 0)
        assert results[0].dtype == dtype
        assert torch.equal(laid_out.double(), copied)
        if not exactly:
            results, expected = results[:1], expected[:1]
        # Products of products of rounded numbers: twice what one operator is allowed.
        for i, (result, oracle) in enumerate(zip(results, expected, strict=True)):
            if oracle is not None:
                assert_close(result, oracle, f'{name}, {i}', 2 * TOLERANCES[dtype])
        if not ours.training:
            with torch.no_grad(), context():
                deployed = acmix_mm.deploy(copy.deepcopy(ours))(laid_out, *rest)
            assert_close(deployed, expected[0], f'{name}, deployed', 2 * TOLERANCES[dtype])

    fuzz(check, examples, campaign, name)


def exported(layer: nn.Module, arguments: tuple) -> Callable:
    return torch.export.export(layer, arguments).module()


def compiled(layer: nn.Module, arguments: tuple) -> Callable:
    torch._dynamo.reset()
    return torch.compile(layer, backend='aot_eager', fullgraph=True)


@pytest.mark.slow
@pytest.mark.parametrize('form', [exported, compiled])
@pytest.mark.parametrize('name', LAYERS)
def test_forms_of_anything(name, form, campaign):
    """Exported or compiled, trained or deployed: the results of the layer called as it is."""

    def check(data):
        layer, channels = LAYERS[name](data)
        layer = randomise(layer).double().eval()
        if data.draw(st.booleans()):
            acmix_mm.deploy(layer)
        arguments = draw_input(data, name, layer, channels)
        with torch.no_grad():
            expected = layer(*arguments)
            assert_close(form(layer, arguments)(*arguments), expected, f'{name}, {form.__name__}')

    fuzz(check, 6, campaign, f'{name}, {form.__name__}')


WRONG = [0, -1, 1.5, '3', None, 2**31]


@pytest.mark.parametrize('layer', [ACmix, XVolution, PatchAttention, PatchACmix, DepthwiseBlock])
def test_wrong_arguments_are_named(layer):
    fitting = {
        ACmix: {'in_channels': 4, 'out_channels': 4},
        XVolution: {'in_channels': 4, 'out_channels': 4},
        PatchAttention: {'in_channels': 4, 'out_channels': 8, 'qk_channels': 2},
        PatchACmix: {'in_channels': 4, 'out_channels': 8, 'qk_channels': 2},
        DepthwiseBlock: {'channels': 4},
    }[layer]
    layer(**fitting)
    names = [
        name for name, parameter in inspect.signature(layer).parameters.items()
        if parameter.annotation in (int, int | tuple[int, int])
    ]  # fmt: skip
    assert set(fitting) < set(names)
    for name in names:
        of_local = layer is XVolution and name in ('num_heads', 'attn_kernel_size')
        others = {'attention': 'local'} if of_local else {}
        for value in [*WRONG, *([2] if 'kernel_size' in name else [])]:
            with pytest.raises((ValueError, TypeError), match=rf'\b{name}\b'):
                pytest.fail(f'{name}={value}: {layer(**{**fitting, **others, name: value})}')
    if 'kernel_groups' in inspect.signature(layer).parameters:
        for value in (*(w for w in WRONG if w is not None), 3):
            with pytest.raises(ValueError, match=r'\bkernel_groups\b'):
                layer(**fitting, kernel_groups=value)
    for name in ('mix', 'shift', 'backend', 'attention', 'dynamic', 'padding'):
        if name in inspect.signature(layer).parameters:
            with pytest.raises(ValueError, match=rf'\b{name}\b'):
                layer(**{**fitting, name: 'none'})
