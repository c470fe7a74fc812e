"""Forms of the convolution path: shifts of tensors, constant, random and shared kernels."""

import copy

import pytest
import torch
from torch import Tensor, nn

import acmix_mm
from acmix_mm.layers import ACmix, MixedOperator
from acmix_mm.layers.mixed_operator import SHIFTS
from acmix_mm.layers.mixing_weights import shift_and_sum, shift_kernel

HEADS, DIM = 4, 3
# Options of the operator by form, and whether it learns kernels.
FORMS = {
    'learned': ({}, True),
    'random': ({'shift': 'random'}, True),
    'fixed': ({'shift': 'fixed'}, False),
    'tensor': ({'shift': 'tensor'}, False),
    'one group': ({'kernel_groups': 1}, True),
    'two groups': ({'kernel_groups': 2, 'shift': 'random'}, True),
}
every_form = pytest.mark.parametrize('form', FORMS)
GEOMETRIES = [  # height, width, kernel size, stride, dilation
    (5, 7, 3, 1, 1),
    (1, 1, 3, 1, 1),
    (6, 5, 3, 2, 1),
    (7, 4, 5, 3, 2),
    (4, 3, 1, 2, 1),
    (2, 6, 3, 1, 9),
]


class ConvolutionPath(MixedOperator):
    """Of maps (B, d, 3 N, H, W), with all that the operators have somewhere."""

    def __init__(self, kernel_size=3, stride=1, dilation=1, heads=HEADS, **options):
        geometry = (kernel_size, stride, dilation)
        given = {'bias': True, 'fc_bias': True, 'mix': 'conv', **options}
        super().__init__(heads * DIM, 3 * heads, DIM, *geometry, **given)

    def forward(self, maps: Tensor) -> Tensor:
        return self.mixing_weights().mix(maps, None, self.backend)


def shifted_sums(maps: Tensor, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """(B, d, k * k, H, W): from each map the pixel that its kernel position points to, summed."""
    height, width = maps.shape[-2:]
    radius, rows = kernel_size // 2, []
    for y in range(0, height, stride):
        row = []
        for x in range(0, width, stride):
            total = torch.zeros(maps.shape[:2], dtype=maps.dtype)
            for i in range(kernel_size):
                for j in range(kernel_size):
                    v, u = y + (i - radius) * dilation, x + (j - radius) * dilation
                    if 0 <= v < height and 0 <= u < width:
                        total = total + maps[:, :, i * kernel_size + j, v, u]
            row.append(total)
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def weighted_sums(maps: Tensor, kernel: Tensor, stride: int, dilation: int) -> Tensor:
    """(B, d, k * k, H, W) by (d, k * k, k, k): the convolution, as sums of shifted sums."""
    kernel_size = kernel.size(-1)
    # Every tap of every map is a map of its own, which is moved by the tap.
    taps = torch.einsum('bdmhw,dmpq->bdpqmhw', maps, kernel).sum(4).flatten(2, 3)
    return shifted_sums(taps, kernel_size, stride, dilation)


def naive(path: ConvolutionPath, maps: Tensor, stride: int, dilation: int) -> Tensor:
    """fc, its bias, then for each output of a head position its kernel, over zeros."""
    fc, bias = path.fc['weight'][..., 0, 0], path.fc['bias']
    mixed = torch.einsum('km,bdmhw->bdkhw', fc, maps) + bias[:, None, None]
    outputs = path.bias.numel() // DIM
    if hasattr(path, 'dep_conv'):
        kernels = path.dep_conv['weight'].unflatten(0, (DIM, -1))
        sums = [
            weighted_sums(mixed, kernels[:, o * kernels.size(1) // outputs], stride, dilation)
            for o in range(outputs)
        ]
    else:
        sums = [shifted_sums(mixed, path.shift_kernel.size(-1), stride, dilation)] * outputs
    return torch.stack(sums, 2).flatten(1, 2) + path.bias[:, None, None]


def build(form: str, *geometry, **options) -> ConvolutionPath:
    """A path with random values for all that is learned."""
    path = ConvolutionPath(*geometry, **FORMS[form][0], **options).double()
    for parameter in path.parameters():
        nn.init.normal_(parameter)
    return path


@every_form
@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('folds', [True, False, None])
def test_equals_the_formulas(form, geometry, folds):
    """Outputs and all gradients; folded, in two steps, and by count."""
    height, width, *geometry = geometry
    path = build(form, *geometry)
    if folds is not None and form != 'tensor':
        path.folds = folds
    maps = torch.randn(2, DIM, 3 * HEADS, height, width, dtype=torch.float64, requires_grad=True)
    out, expected = path(maps), naive(path, maps, *geometry[1:])
    torch.testing.assert_close(out, expected)
    leaves, grad = (maps, *path.parameters()), torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    )


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_tensor_shifts_equal_fixed_kernels_exactly(geometry, dtype):
    """On whole numbers, of which no sum here rounds; fc's bias included, where zeros are padded."""
    height, width, *geometry = geometry
    numbers = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=numbers).to(dtype)

    paths = [ConvolutionPath(*geometry, shift=s).to(dtype) for s in ('tensor', 'fixed', 'fixed')]
    for parameter, *others in zip(*(path.parameters() for path in paths), strict=True):
        parameter.data = whole(*parameter.shape)
        for other in others:
            other.data = parameter.data.clone()
    paths[1].folds = False
    acmix_mm.deploy(paths[2].eval())
    maps = whole(2, DIM, 3 * HEADS, height, width)
    by_tensors, by_convolution, deployed = (path(maps) for path in paths)
    assert by_tensors.abs().max() > 1
    assert torch.equal(by_tensors, by_convolution)
    assert torch.equal(by_tensors, deployed)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_shift_and_sum_is_the_convolution_with_shift_kernels(geometry):
    height, width, kernel_size, stride, dilation = geometry
    maps = torch.randn(2, DIM, kernel_size**2, height, width, dtype=torch.float64)
    out = shift_and_sum(maps, kernel_size, stride, dilation)
    torch.testing.assert_close(out, shifted_sums(maps, kernel_size, stride, dilation))


@every_form
@pytest.mark.parametrize('heads', [1, 4, 8])
@pytest.mark.parametrize('with_norm', [False, True])
def test_deploys(form, heads, with_norm):
    """Within rounding of what it was, whether folding pays (up to 4 heads) or not."""
    if form == 'two groups' and heads == 1:
        heads = 2
    path = build(form, 3, 2, 1, heads=heads, bias=False)
    norm = nn.BatchNorm2d(heads * DIM).double().eval()
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    maps = torch.randn(2, DIM, 3 * heads, 5, 6, dtype=torch.float64)
    expected = norm(path(maps)) if with_norm else path(maps)
    path.switch_to_deploy(norm if with_norm else None)
    torch.testing.assert_close(path(maps), expected)
    names = path.state_dict().keys()
    assert 'kernel' in names
    assert not {'shift_kernel', 'dep_conv.weight'} & names
    assert not list(path.buffers())


@pytest.mark.parametrize('num_heads', [4, 8])
@every_form
def test_the_whole_layer_is_its_paths(form, num_heads):
    """Also deployed. Four heads are one operator with the attention, eight are not."""

    def make(mix: str) -> ACmix:
        return ACmix(8, 16, num_heads=num_heads, stride=2, mix=mix, **FORMS[form][0]).double()

    layer = make('learned')
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x, expected = torch.randn(1, 8, 7, 6, dtype=torch.float64), 0
    for mix, rate in (('attention', layer.rate1), ('conv', layer.rate2)):
        path = make(mix)
        own = path.state_dict().keys()
        path.load_state_dict({n: v for n, v in layer.state_dict().items() if n in own})
        expected = expected + rate * path(x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(acmix_mm.deploy(layer.eval())(x), expected)


@every_form
def test_the_fused_operator_is_used_where_folding_pays(form, monkeypatch):
    calls = []
    fused = acmix_mm.layers.acmix.fused_acmix
    monkeypatch.setattr(
        acmix_mm.layers.acmix, 'fused_acmix', lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    layer, x = ACmix(8, 8, **FORMS[form][0]), torch.randn(1, 8, 5, 6)
    layer(x)
    assert len(calls) == (form != 'tensor')
    acmix_mm.deploy(layer.eval())(x)
    assert len(calls) == 1 + (form != 'tensor')


@pytest.mark.parametrize(('groups', 'shared'), [(1, 4), (2, 2), (4, 1), (None, 1)])
def test_outputs_share_kernels(groups, shared):
    """Adjacent outputs of a head position are equal, as many as share a kernel, and no more."""
    path = ConvolutionPath(shift='random', kernel_groups=groups)
    assert path.kernel_groups == HEADS // shared
    assert path.dep_conv['weight'].shape == (DIM * HEADS // shared, 9, 3, 3)
    out = path(torch.randn(1, DIM, 3 * HEADS, 5, 6)).unflatten(1, (DIM, HEADS // shared, shared))
    torch.testing.assert_close(out, out[:, :, :, :1].expand(out.shape))
    distinct = out[:, :, :, 0].flatten(0, 1).flatten(1)
    assert len(distinct.unique(dim=1)) == DIM
    if groups != 1:
        assert (out[:, :, 0, 0] - out[:, :, 1, 0]).abs().max() > 1e-3


def test_initial_kernels():
    """Of random ones the standard deviation is Kaiming's: sqrt(2 / (k^2 C)), the fan-out."""
    assert torch.equal(ACmix(32, 256).dep_conv['weight'], shift_kernel(256, 64, 3))
    one = ACmix(32, 256, kernel_groups=1).dep_conv['weight']
    assert torch.equal(one, shift_kernel(64, 64, 3))
    random = ACmix(32, 256, shift='random').dep_conv['weight']
    assert random.mean().abs() < 1e-3
    assert random.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.02)
    for shift in ('fixed', 'tensor'):
        layer = ACmix(32, 256, shift=shift)
        assert torch.equal(layer.shift_kernel, shift_kernel(1, 1, 3))
        assert not layer.shift_kernel.requires_grad


def test_parameters():
    """Constant kernels are no parameters, and each group of kernels has k^4 d."""
    full = sum(p.numel() for p in ACmix(8, 16).parameters())
    for form, kernels in (('one group', 1), ('two groups', 2), ('fixed', 0), ('tensor', 0)):
        layer = ACmix(8, 16, **FORMS[form][0])
        assert sum(p.numel() for p in layer.parameters()) == full - 81 * 4 * (4 - kernels)
        layer(torch.randn(1, 8, 5, 6)).square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'shift': 'roll'}, "shift must be one of .*'learned'.*'tensor'.* got 'roll'"),
        ({'kernel_groups': 3}, 'kernel_groups must be a divisor of the 4 outputs .* got 3'),
        ({'kernel_groups': 8}, 'kernel_groups must be a divisor of the 4 outputs .* got 8'),
        ({'kernel_groups': 0}, 'kernel_groups must be a positive integer, got 0'),
        ({'kernel_groups': True}, 'kernel_groups must be a positive integer, got True'),
        (
            {'shift': 'fixed', 'kernel_groups': 2},
            "kernel_groups must be None or 1 with shift 'fixed', .* got 2",
        ),
        (
            {'shift': 'tensor', 'kernel_groups': 4},
            "kernel_groups must be None or 1 with shift 'tensor', .* got 4",
        ),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ACmix(8, 8, **options)


@pytest.mark.parametrize('strict', [True, False])
def test_state_dicts_of_other_kernels_are_refused(strict):
    """Constant kernels into learned ones and the reverse; kinds of one sort load each other's."""
    layers = {shift: ACmix(8, 8, shift=shift) for shift in SHIFTS}
    constant = {'fixed', 'tensor'}
    for theirs, source in layers.items():
        for ours, layer in layers.items():
            if (theirs in constant) == (ours in constant):
                layer.load_state_dict(source.state_dict(), strict=strict)
                continue
            name = 'shift_kernel' if theirs in constant else r'dep_conv\.weight'
            sort = 'constant' if theirs in constant else 'learned'
            message = f'state dict has {sort} kernels, with .{name}., and the operator .*{ours}'
            with pytest.raises(ValueError, match=message):
                layer.load_state_dict(source.state_dict(), strict=strict)


@pytest.mark.parametrize('strict', [True, False])
def test_state_dicts_of_other_numbers_of_kernels_are_refused(strict):
    with pytest.raises(RuntimeError, match=r'size mismatch for dep_conv\.weight'):
        ACmix(8, 8, kernel_groups=1).load_state_dict(ACmix(8, 8).state_dict(), strict=strict)


def test_weights_of_a_plain_network_leave_constant_kernels_as_they_are():
    """They have neither kind."""
    layer = ACmix(8, 8, shift='fixed')
    layer.load_state_dict(ACmix(8, 8, mix='attention').state_dict(), strict=False)
    assert torch.equal(layer.shift_kernel, shift_kernel(1, 1, 3))


def test_only_attention_has_no_kernels():
    for shift in SHIFTS:
        layer = ACmix(8, 8, mix='attention', shift=shift)
        names = layer.state_dict().keys()
        assert not {'fc.weight', 'dep_conv.weight', 'shift_kernel'} & names
        layer.load_state_dict(ACmix(8, 8).state_dict(), strict=False)


@pytest.mark.parametrize(('form', 'heads'), [('tensor', 4), ('fixed', 8), ('one group', 8)])
def test_exports_with_symbols_for_sizes(form, heads):
    """Height and width are symbols, trained and deployed."""
    layer = ACmix(8, 8, stride=2, num_heads=heads, **FORMS[form][0]).eval()
    size = {2: torch.export.Dim('height', min=4), 3: torch.export.Dim('width', min=4)}
    for module in (layer, acmix_mm.deploy(copy.deepcopy(layer))):
        program = torch.export.export(module, (torch.randn(1, 8, 9, 12),), dynamic_shapes=(size,))
        for shape in ((9, 12), (16, 5)):
            x = torch.randn(1, 8, *shape)
            torch.testing.assert_close(program.module()(x), module(x))
