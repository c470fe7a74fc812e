"""Costs by stage against PyTorch's counter on single paths, plain networks, and the paper."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones import PyramidVisionTransformer, ResNet, SwinTransformer
from mmdet.models.backbones.pvt import SpatialReductionAttention
from mmdet.models.backbones.swin import WindowMSA
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from acmix_mm import deploy
from acmix_mm.analysis.baselines import UnfoldACmix
from acmix_mm.analysis.costs import Cost, NetworkCosts, Stages, count_flops, network_costs
from acmix_mm.analysis.networks import backbone_config, build_model
from acmix_mm.backbones import (
    SAN,
    ACmixPyramidVisionTransformer,
    ACmixResNet,
    ACmixSAN,
    ACmixSwinTransformer,
)
from acmix_mm.layers import (
    ACmix,
    MixedOperator,
    PatchACmix,
    PatchAttention,
    SpatialReductionACmix,
    WindowACmix,
)
from acmix_mm.ops import local_aggregation

BACKBONES = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'backbones'
BATCH = 2


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def counted(module: nn.Module, *inputs) -> Cost:
    """Parameters, and FLOPs by PyTorch's counter in evaluation mode."""
    module.eval()
    with torch.no_grad():
        return Cost(count_parameters(module), count_flops(lambda: module(*inputs)))


@pytest.mark.parametrize(
    ('name', 'billions'), [('r50', 4.09), ('acmix-r50', 3.6), ('swin-t', 4.5), ('pvt-s', 3.8)]
)
def test_published_flops(name, billions):
    """At 224 pixels; the figures are with a classifier, which is negligible."""
    model = build_model(backbone_config(str(BACKBONES / f'{name}.py')))
    model.eval()
    image = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        assert count_flops(lambda: model(image)) / 1e9 == pytest.approx(billions, rel=0.04)


def test_flops_of_operators():
    channels, pixels = 32, 12 * 10
    layer, x = ACmix(channels, channels), torch.zeros(1, channels, 12, 10)
    paths = 3 * channels + 2 * 49 + 9 * 12  # projections, logits and sums of 49, folded convolution
    folding = channels * 9 * 9 * 12
    with torch.no_grad():
        assert count_flops(lambda: layer(x)) == channels * pixels * paths + folding
    value, weight = torch.zeros(1, 8, 12, 10), torch.zeros(1, 4, 25, 12, 10)
    assert count_flops(lambda: local_aggregation(value, weight, 5)) == 25 * 8 * pixels
    query = torch.zeros(1, 2, 30, 16)
    attend = F.scaled_dot_product_attention
    assert count_flops(lambda: attend(query, query, query)) == 2 * 2 * 30 * 30 * 16


# Layers.


class Tokens(nn.Module):
    """A layer of PVT, called with an image as all others are."""

    def __init__(self, layer: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.layer, self.size = layer, size

    def forward(self, x):
        return self.layer(x.flatten(2).transpose(1, 2), hw_shape=self.size)


class ChannelsLast(nn.Module):
    """A layer of Swin, called with an image as all others are."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1))


def plain_window(heads: int) -> WindowMSA:
    return WindowMSA(embed_dims=12, num_heads=heads, window_size=(3, 5))


def plain_reduction(ratio: int) -> SpatialReductionAttention:
    return SpatialReductionAttention(embed_dims=12, num_heads=2, sr_ratio=ratio)


def window(heads: int, mix: str, **shift) -> nn.Module:
    return ChannelsLast(WindowACmix(plain_window(heads), mix=mix, **shift))


def reduction(ratio: int, mix: str, **shift) -> nn.Module:
    return Tokens(SpatialReductionACmix(plain_reduction(ratio), mix=mix, **shift), (9, 10))


def acmix(*args, **kwargs):
    return lambda mix, **shift: ACmix(*args, mix=mix, **kwargs, **shift)


# Layers by mix, and the size of their maps. Few heads let the convolution path fold, many do not.
LAYERS = {
    'ACmix': (acmix(12, 12, num_heads=2, attn_kernel_size=3), (12, 9, 10)),
    'ACmix, wider, stride': (acmix(12, 20, 5, 2, num_heads=2, bias=True), (12, 9, 11)),
    'ACmix, groups, dilation': (acmix(12, 24, dilation=3, groups=3), (12, 7, 5)),
    'ACmix, many heads, stride': (acmix(12, 24, stride=3, num_heads=24), (12, 10, 8)),
    'PatchACmix': (lambda mix, **shift: PatchACmix(24, 16, 4, 5, mix=mix, **shift), (24, 9, 11)),
    'WindowACmix': (partial(window, 2), (12, 9, 10)),
    'WindowACmix, many heads': (partial(window, 6), (12, 9, 10)),
    'SpatialReductionACmix': (partial(reduction, 1), (12, 9, 10)),
}


def costs_of(layer: nn.Module, x: torch.Tensor):
    """The one operator's costs, which are all of the layer's."""
    costs = network_costs(layer, x)
    (operator,) = costs.operators
    assert costs.whole == operator.mixed.total
    assert operator.counted == costs.whole.flops == counted(layer, x).flops
    return operator


@pytest.mark.parametrize('form', ['trained', 'deployed'])
@pytest.mark.parametrize('name', LAYERS)
def test_stages_of_layers(name, form):
    """One path alone computes Stage I and that path: three counts for three unknowns."""
    make, shape = LAYERS[name]
    x = torch.randn(BATCH, *shape)
    layers = {mix: make(mix) for mix in ('learned', 'attention', 'conv')}
    if form == 'deployed':
        for layer in layers.values():
            deploy(layer.eval())
    both, attention, convolution = (counted(layer, x) for layer in layers.values())
    costs = costs_of(layers['learned'], x)
    stages = costs.mixed
    # Rates and biases of the output are of more than one layer, so parameters are told below.
    assert stages.projection.flops == attention.flops + convolution.flops - both.flops
    assert stages.attention.flops == both.flops - convolution.flops
    assert stages.convolution.flops == both.flops - attention.flops
    assert costs.self_attention.total.flops == attention.flops
    if form == 'trained':
        assert costs.self_attention.total.parameters == attention.parameters

    alone = costs_of(layers['attention'], x)
    assert alone.mixed == alone.two_steps
    assert alone.mixed.projection == stages.projection
    assert alone.mixed.attention.flops == stages.attention.flops
    assert (alone.mixed.convolution, alone.convolution) == (Cost(), None)
    alone = costs_of(layers['conv'], x)
    assert (alone.mixed.projection, alone.mixed.attention) == (stages.projection, Cost())
    assert alone.mixed.convolution.flops == stages.convolution.flops
    assert alone.convolution == costs.convolution
    assert alone.self_attention is alone.self_attention_at_output is None


@pytest.mark.parametrize('form', ['trained', 'deployed'])
@pytest.mark.parametrize('shift', [{'shift': 'tensor'}, {'shift': 'fixed'}, {'kernel_groups': 1}])
@pytest.mark.parametrize('name', LAYERS)
def test_forms_of_the_shift(name, shift, form):
    """The closed form is what is counted; shifts of tensors are additions."""
    make, shape = LAYERS[name]
    x = torch.randn(BATCH, *shape)
    layer = make('learned', **shift)
    if form == 'deployed':
        deploy(layer.eval())
    costs, learned = costs_of(layer, x), costs_of(make('learned'), x)
    assert costs.mixed.projection.flops == learned.mixed.projection.flops
    assert costs.two_steps.convolution.flops < learned.two_steps.convolution.flops


@pytest.mark.parametrize('mix', ['sum', 'complementary'])
@pytest.mark.parametrize('name', LAYERS)
def test_other_combinations_cost_the_same(name, mix):
    """But for the rates, none or one."""
    make, shape = LAYERS[name]
    x = torch.randn(BATCH, *shape)
    other, learned = costs_of(make(mix), x), costs_of(make('learned'), x)
    rates = Stages(attention=Cost(1 if mix == 'sum' else 0), convolution=Cost(1))
    assert learned.mixed == other.mixed + rates


@pytest.mark.parametrize('mix', ['learned', 'attention', 'conv'])
def test_stages_of_spatial_reduction(mix):
    """Attention alone projects queries only of the full map, so each part is counted by itself."""
    x = torch.randn(BATCH, 12, 9, 10)
    costs = costs_of(reduction(2, mix), x)
    tokens, keys = torch.randn(BATCH, 90, 12), torch.randn(BATCH, 20, 12)
    stages = {'projection': 0, 'attention': 0}
    if mix != 'attention':
        stages['projection'] += counted(nn.Linear(12, 36), tokens).flops
    else:
        stages['projection'] += counted(nn.Linear(12, 12), tokens).flops
    if mix != 'conv':
        stages['projection'] += counted(nn.Linear(12, 24), keys).flops
        stages['attention'] += counted(nn.Conv2d(12, 12, 2, 2), x).flops
        heads = [t.unflatten(2, (2, 6)).transpose(1, 2) for t in (tokens, keys)]
        stages['attention'] += count_flops(
            lambda: (heads[0] @ heads[1].mT).softmax(-1) @ heads[1]  # logits, weighted sum
        )
        stages['attention'] += counted(nn.Linear(12, 12), tokens).flops
    for stage, flops in stages.items():
        assert getattr(costs.mixed, stage).flops == flops
    assert costs.mixed.total.flops == costs.counted  # so that the convolution path is right, too


@pytest.mark.parametrize(
    ('plain', 'mixed'),
    [
        (lambda: ChannelsLast(Windows(plain_window(2))), lambda: window(2, 'learned')),
        (lambda: Tokens(plain_reduction(1), (9, 10)), lambda: reduction(1, 'learned')),
        (lambda: Tokens(plain_reduction(2), (9, 10)), lambda: reduction(2, 'learned')),
        (lambda: PatchAttention(12, 16, 4, 5), lambda: PatchACmix(12, 16, 4, 5)),
    ],
)
def test_self_attention_alone_is_the_plain_operator(plain, mixed):
    """Of mmdet's Swin and PVT, and of SAN."""
    x = torch.randn(BATCH, 12, 9, 10)
    costs = costs_of(mixed(), x)
    assert costs.self_attention.total == counted(plain(), x)
    assert costs.self_attention == costs.self_attention_at_output


class Windows(nn.Module):
    """mmdet's window attention on the windows of a map."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        windows = x.unflatten(2, (-1, 5)).unflatten(1, (-1, 3)).transpose(2, 3)
        return self.layer(windows.flatten(3, 4).flatten(0, 2))


class Additions(TorchDispatchMode):
    """Counts elements that are added."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.add_.Tensor:
            self.count += out.numel()
        return out


@pytest.mark.parametrize(
    ('channels', 'kernel_size', 'stride', 'groups', 'bias'),
    [((12, 12), 3, 1, 1, False), ((12, 20), 5, 2, 1, True), ((12, 24), 3, 3, 4, False)],
)
def test_plain_convolution(channels, kernel_size, stride, groups, bias):
    """Its multiplications are Stage I; shifted, the k^2 projections are summed in Stage II."""
    x = torch.randn(BATCH, channels[0], 9, 10)
    layer = ACmix(*channels, kernel_size, stride, groups=groups, bias=bias)
    plain = nn.Conv2d(*channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
    costs = costs_of(layer, x).convolution
    assert costs.projection == counted(plain, x)

    # In the paper's two stages, of which the first computes only what is kept.
    height, width = -(-9 // stride), -(-10 // stride)
    padded = F.pad(x, [kernel_size // 2] * 4)
    with torch.no_grad(), Additions() as additions:
        out = torch.zeros(BATCH, channels[1], height, width)
        for row in range(kernel_size):
            for column in range(kernel_size):
                kept = padded[:, :, row::stride, column::stride][..., :height, :width]
                weight = plain.weight[..., row : row + 1, column : column + 1]
                out += F.conv2d(kept, weight, groups=groups)
    torch.testing.assert_close(out, F.conv2d(padded, plain.weight, None, stride, groups=groups))
    assert costs.convolution == Cost(0, additions.count)


@pytest.mark.parametrize(
    ('arguments', 'stride'), [({'num_heads': 2}, 1), ({'num_heads': 2}, 2), ({'num_heads': 6}, 1)]
)
def test_two_steps_are_those_of_the_published_formulation(arguments, stride):
    """Which the unfold baseline writes out: its products are Stage I, fc and shift convolution."""
    x = torch.randn(BATCH, 12, 9, 11)
    layer = ACmix(12, 12, stride=stride, **arguments)
    stages = costs_of(layer, x).two_steps
    baseline = counted(UnfoldACmix(12, 12, stride=stride, **arguments), x)
    assert baseline.flops == stages.projection.flops + stages.convolution.flops
    # 3 k_c^2 C a pixel of the map for fc, k_c^4 C an output for the shifts.
    pixels, outputs = 9 * 11, {1: 9 * 11, 2: 5 * 6}[stride]
    assert stages.convolution.flops == BATCH * 12 * (27 * pixels + 81 * outputs)


def test_closed_forms_of_parameters():
    layer = ACmix(12, 24, 5, groups=3, num_heads=4, bias=True)
    stages = costs_of(layer, torch.randn(1, 12, 6, 6)).mixed
    assert stages.projection.parameters == 3 * (12 // 3 * 24 + 24)
    assert stages.attention.parameters == 2 * 24 // 4 + 1  # conv_p, rate1
    assert stages.convolution.parameters == 3 * 4 * 25 + 25**2 * 24 + 1 + 24  # rate2, bias

    stages = costs_of(window(2, 'learned'), torch.randn(1, 12, 9, 10)).mixed
    assert stages.projection.parameters == 3 * 12 * 13
    assert stages.attention.parameters == 12 * 13 + 2 * 5 * 9 + 1  # projection, table, rate1
    assert stages.convolution.parameters == 9 * (3 * 2 + 1) + 81 * 12 + 1

    stages = costs_of(reduction(2, 'learned'), torch.randn(1, 12, 9, 10)).mixed
    assert stages.projection.parameters == 3 * 12 * 13
    assert stages.attention.parameters == 4 * 12**2 + 12 + 2 * 12 + 12 * 13 + 1
    assert stages.convolution.parameters == 9 * 3 * 2 + 81 * 12 + 1


# Networks.


SMALL_PVT = {'num_layers': [1, 1, 2, 1], 'embed_dims': 16}
SMALL_SWIN = {'embed_dims': 24, 'depths': (2, 1, 2, 1)}
# Mixed networks, and the plain ones of the families.
NETWORKS = {
    'ResNet': (ACmixResNet, {'depth': 26, 'base_channels': 16}, None),
    'SAN': (ACmixSAN, {'depth': 10, 'base_channels': 32}, SAN),
    'PVT': (ACmixPyramidVisionTransformer, SMALL_PVT, PyramidVisionTransformer),
    'Swin': (ACmixSwinTransformer, SMALL_SWIN, SwinTransformer),
}


@pytest.mark.parametrize('family', NETWORKS)
def test_networks(family):
    """Self-attention in all places is the plain network of the family; odd sizes."""
    make, options, plain = NETWORKS[family]
    image = torch.zeros(1, 3, 75, 101)
    mixed = make(**options)
    costs = network_costs(mixed, image)
    assert costs.whole == counted(mixed, image)
    assert len(costs.operators) == sum(isinstance(m, MixedOperator) for m in mixed.modules())
    assert all(op.mixed.total.flops == op.counted > 0 for op in costs.operators)
    alone = make(**options, mix='attention')
    assert costs.whole_with('self_attention') == counted(alone, image)
    if plain is not None:
        assert costs.whole_with('self_attention') == counted(plain(**options), image)
    steps, own = costs.stages('two_steps'), costs.stages('mixed')
    assert costs.whole_with('two_steps') - costs.whole == steps.total - own.total


def test_resnet_with_plain_convolutions_is_a_resnet():
    image = torch.zeros(1, 3, 75, 101)
    costs = network_costs(ACmixResNet(50, base_channels=16), image)
    assert costs.whole_with('convolution') == counted(ResNet(50, base_channels=16), image)


def share(first: float, second: float) -> float:
    return first / (first + second)


@pytest.fixture(scope='module')
def resnet50() -> NetworkCosts:
    return network_costs(ACmixResNet(50), (64, 64))


def test_shares_of_resnet50(resnet50):
    """The paper's 99 % and 83 % of Table 1: means over the 16 3x3 convolutions, or by FLOPs."""
    channels = [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    convolution = [share(9 * c * c, 9 * c) for c in channels]
    attention = [share(3 * c * c, 2 * 49 * c) for c in channels]
    means = [100 * sum(shares) / 16 for shares in (convolution, attention)]
    assert means == [pytest.approx(99, abs=1), pytest.approx(83, abs=1)]
    got = [
        100 * resnet50.mean_projection_share(form)
        for form in ('convolution', 'self_attention_at_output')
    ]
    assert got == [pytest.approx(mean, abs=1e-9) for mean in means]
    # By FLOPs: C^2 HW is the same in all stages.
    total = share(3 * 16, 98 * sum(1 / c for c in channels))
    stages = resnet50.stages('self_attention_at_output')
    assert stages.projection_share == pytest.approx(total, abs=1e-9)
    assert 100 * total == pytest.approx(83, abs=1)
    assert 100 * resnet50.stages('convolution').projection_share == pytest.approx(99, abs=1)


def test_stride_projects_the_map_before_it(resnet50):
    """So that Stage I is four times as much in three of 16 blocks."""
    alone, at_output = (
        resnet50.stages(form) for form in ('self_attention', 'self_attention_at_output')
    )
    assert 16 * alone.projection.flops == (13 + 3 * 4) * at_output.projection.flops
    assert alone.attention == at_output.attention
    strides = [op.stride for op in resnet50.operators]
    assert strides == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]


# A user's own models.


class Head(nn.Module):
    """One operator for maps of several sizes, as in heads of detectors."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.mixed = ACmix(8, 8)
        self.unused = ACmix(8, 8)

    def forward(self, x):
        x = self.conv(x)
        return self.mixed(x), self.mixed(x[..., ::2, ::2])


def test_own_model_that_calls_an_operator_twice():
    model = Head()
    costs = network_costs(model, (9, 12))
    assert (costs.image, costs.backbone) == ((9, 12), None)
    assert costs.whole == counted(model, torch.zeros(1, 3, 9, 12))
    operator, unused = costs.operators
    assert (operator.name, operator.kind, operator.channels) == ('mixed', 'ACmix', (8, 8))
    assert operator.maps == ((9, 12), (5, 6))
    each = [network_costs(model.mixed, torch.zeros(1, 8, *size)).whole for size in operator.maps]
    assert operator.mixed.total == Cost(each[0].parameters, each[0].flops + each[1].flops)
    assert unused.mixed.total == Cost(each[0].parameters, 0)
    assert unused.maps == ()
    assert costs.mean_projection_share('mixed') == operator.mixed.projection_share


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ACmix(8, 8), nn.Dropout())
    model[2].eval()
    before = [module.training for module in model.modules()]
    network_costs(model.double(), (5, 6))
    assert [module.training for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RuntimeError):
        network_costs(model, torch.zeros(1, 4, 5, 6))
    assert [module.training for module in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_model_without_mixed_operators():
    costs = network_costs(nn.Conv2d(3, 4, 3), (5, 6))
    assert costs == NetworkCosts(Cost(112, 27 * 4 * 3 * 4), None, (5, 6), ())
    assert costs.stages('mixed') == Stages()
    assert costs.whole_with('convolution') == costs.whole


def test_masks_of_cascades_are_limited_meanwhile():
    pytest.importorskip('mmdet')

    class RoIHead(nn.Module):
        num_stages = 3

        def _mask_forward(self, stage, x, rois):
            return {'mask_preds': x[0].new_zeros(len(rois), 8, 1, 1) @ x[0].new_zeros(1, 1)}

    class Cascade(nn.Module):
        def __init__(self):
            super().__init__()
            self.roi_head = RoIHead()

        def data_preprocessor(self, data):
            return {**data, 'inputs': torch.stack(data['inputs']).float()}

        def forward(self, images, data_samples, mode):
            assert mode == 'tensor'
            assert data_samples[0].img_shape == (7, 8)
            results = self.roi_head._mask_forward(0, (images,), torch.zeros(150, 5))
            assert len(results['mask_preds']) == 150

    model = Cascade()
    assert network_costs(model, (7, 8)).whole.flops == 100 * 8
    assert '_mask_forward' not in vars(model.roi_head)


@pytest.mark.parametrize('size', [(0, 5), (5, 2.5), (True, 5)])
def test_wrong_sizes(size):
    with pytest.raises(ValueError, match=r'(height|width) must be a positive integer, got'):
        network_costs(nn.Conv2d(3, 3, 1), size)


def test_unknown_operator():
    model = nn.Sequential(MixedOperator(8, 6, 4))
    with pytest.raises(ValueError, match=r'kinds ACmix, .* got MixedOperator as .0.'):
        network_costs(model, torch.zeros(1, 8, 5, 5))
