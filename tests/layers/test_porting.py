"""Coming from a copied ACmix file: what loads, what stays the same, and what works only here.

README, 'Coming from a copied ACmix file', says nothing that is not tested here.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_mm.layers import ACmix
from acmix_mm.layers.mixing_weights import shift_kernel
from acmix_mm.ops import available_backends
from acmix_mm.ops import reference as oracles

BACKENDS = [b for b in available_backends() if b != 'triton']  # those that take float64


class Unfolded(nn.Module):
    """ACmix with arguments and parameter names of the copied files, every window unfolded.

    Written from the formulas of the paper. It goes beyond what those files can compute: maps are
    reflected as often as a window needs, a stride rounds sizes up, and both paths are dilated.
    """

    def __init__(
        self, in_planes, out_planes, kernel_att=7, head=4, kernel_conv=3, stride=1, dilation=1
    ):
        super().__init__()
        dim, positions = out_planes // head, kernel_conv**2
        self.heads, self.window, self.stride, self.dilation = head, kernel_att, stride, dilation
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(in_planes, out_planes, 1) for _ in range(3))
        self.conv_p = nn.Conv2d(2, dim, 1)
        self.fc = nn.Conv2d(3 * head, positions, 1, bias=False)
        self.dep_conv = nn.Conv2d(
            positions * dim, out_planes, kernel_conv, stride, kernel_conv // 2 * dilation, dilation,
            groups=dim, bias=False,
        )  # fmt: skip
        self.rate1, self.rate2 = (nn.Parameter(torch.rand(1)) for _ in range(2))

    def windows(self, maps: Tensor) -> Tensor:
        """(..., d, H, W) -> (..., d, k * k, Hq, Wq)."""
        reach = self.window // 2 * self.dilation
        rows, cols = (
            [oracles.mirror(i, size) for i in range(-reach, size + reach)]
            for size in maps.shape[-2:]
        )
        padded = maps[..., rows, :][..., cols].flatten(0, -4)
        columns = F.unfold(padded, self.window, self.dilation, stride=self.stride)
        height, width = (-(-size // self.stride) for size in maps.shape[-2:])
        return columns.view(*maps.shape[:-2], self.window**2, height, width)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        query, key, value = (
            conv(x).unflatten(1, (self.heads, -1)) for conv in (self.conv1, self.conv2, self.conv3)
        )
        grid = torch.meshgrid(
            torch.linspace(-1, 1, height, dtype=x.dtype),
            torch.linspace(-1, 1, width, dtype=x.dtype),
            indexing='ij',
        )
        position = self.conv_p(torch.stack(grid[::-1])[None])
        at_query = (..., None, slice(None, None, self.stride), slice(None, None, self.stride))
        relative = position[at_query] - self.windows(position[None])[0]
        logits = (query[at_query] * (self.windows(key) + relative)).sum(2) * query.size(2) ** -0.5
        weights = logits.softmax(2).unsqueeze(2)
        attention = (weights * self.windows(value)).sum(3).flatten(1, 2)

        stack = torch.cat([query, key, value], 1).flatten(3)  # (B, 3 N, d, H * W)
        mixed = self.fc(stack).transpose(1, 2).reshape(len(x), -1, height, width)
        return self.rate1 * attention + self.rate2 * self.dep_conv(mixed)


def pair(arguments: dict, backend=None) -> tuple[Unfolded, ACmix]:
    """The layer of a copied file, with random weights, and what the README writes instead."""
    copied = Unfolded(8, 16, **arguments).double()
    arguments = {'kernel_att': 7, 'head': 4, 'kernel_conv': 3, **arguments}
    layer = ACmix(
        8,
        16,
        kernel_size=arguments.pop('kernel_conv'),
        num_heads=arguments.pop('head'),
        attn_kernel_size=arguments.pop('kernel_att'),
        backend=backend,
        **arguments,  # stride, dilation
    ).double()
    layer.load_state_dict(copied.state_dict())
    return copied, layer


def assert_equal(copied: Unfolded, layer: ACmix, size, memory_format=torch.contiguous_format):
    """Outputs and all gradients."""
    results = []
    x = torch.randn(2, 8, *size, dtype=torch.float64).contiguous(memory_format=memory_format)
    grad = torch.randn(2, 16, *(-(-n // copied.stride) for n in size), dtype=torch.float64)
    for module in (copied, layer):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.backward(grad)
        gradients = {name: p.grad for name, p in module.named_parameters()}
        results.append({'out': out, 'input': leaf.grad, **gradients})
    expected, result = results
    # It drops out of the softmax, so the layer has none.
    assert expected.pop('conv_p.bias').abs().max() < 1e-12
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(
    ('size', 'arguments'),
    [
        ((8, 10), {}),
        ((4, 6), {}),
        ((8, 10), {'kernel_att': 3, 'head': 2}),
        ((6, 4), {'kernel_att': 5, 'head': 8}),
        ((8, 6), {'kernel_att': 1, 'head': 1}),
    ],
)
def test_equals_the_copied_file(size, arguments, stride, backend):
    """Its state dict loads, with equal outputs and gradients."""
    copied, layer = pair({**arguments, 'stride': stride}, backend)
    assert_equal(copied, layer, size)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    ('size', 'arguments'),
    [
        ((3, 6), {}),
        ((1, 1), {'stride': 2}),
        ((9, 7), {'stride': 2}),
        ((8, 9), {'stride': 2}),
        ((10, 11), {'stride': 3}),
        ((12, 10), {'dilation': 2}),
        ((12, 10), {'dilation': 2, 'stride': 2, 'kernel_att': 3}),
        ((8, 10), {'kernel_conv': 1}),
        ((8, 10), {'kernel_conv': 5}),
    ],
)
def test_works_where_the_copied_file_stops(size, arguments, backend):
    """Small maps, odd sizes with a stride, dilation, any odd kernel: as the formulas say."""
    copied, layer = pair(arguments, backend)
    assert_equal(copied, layer, size)


@pytest.mark.parametrize('mix', ['attention', 'conv'])
def test_dilation_reaches_both_paths(mix):
    """A pixel sees the pixels two apart, and those only."""
    layer = ACmix(8, 8, dilation=2, attn_kernel_size=3, mix=mix)
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    layer(x)[..., 4, 4].square().sum().backward()
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[2:7:2, 2:7:2] = True
    assert torch.equal(x.grad[0].abs().amax(0) > 0, seen)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2), (torch.float32, 1e-5)]
)
def test_trains_in_every_dtype(dtype, tolerance, backend):
    copied, layer = pair({}, backend)
    layer.to(dtype)
    x = torch.randn(2, 8, 3, 6, dtype=torch.float64)
    expected, out = copied(x), layer(x.to(dtype))
    assert out.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance * scale)
    out.square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.dtype == dtype
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize('backend', BACKENDS)
def test_channels_last(backend):
    copied, layer = pair({}, backend)
    assert_equal(copied, layer, (8, 10), torch.channels_last)


@pytest.mark.parametrize('backend', BACKENDS)
def test_compiles_as_one_graph(backend):
    copied, layer = pair({'stride': 2}, backend)
    layer.compile(fullgraph=True, backend='aot_eager')
    assert_equal(copied, layer, (9, 7))


def test_loads_inside_a_model():
    """By its names: nothing of the model around it need be known."""
    copied, layer = pair({})
    models = [nn.Sequential(nn.Conv2d(3, 8, 3), module).double() for module in (copied, layer)]
    nn.init.normal_(layer.rate1)
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(1, 3, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(models[1](x), models[0](x))


def test_bias_of_dep_conv():
    """The few copies that keep it add it within the convolution path: an output bias here."""
    copied, layer = pair({'stride': 2})
    copied.dep_conv.bias = nn.Parameter(torch.randn(16, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*dep_conv\.bias'):
        layer.load_state_dict(copied.state_dict())

    layer = ACmix(8, 16, stride=2, bias=True).double()
    state = copied.state_dict()
    state['bias'] = state['rate2'] * state.pop('dep_conv.bias')
    layer.load_state_dict(state)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), copied(x))


def test_bias_of_fc_is_refused():
    state = {**pair({})[0].state_dict(), 'fc.bias': torch.zeros(9)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*fc\.bias'):
        ACmix(8, 16).load_state_dict(state)


def test_initial_weights():
    """A model's own initialisation of all convolutions does not meet the layer's."""
    layer = ACmix(32, 256)
    state = copy.deepcopy(layer.state_dict())
    layer.apply(lambda m: isinstance(m, nn.Conv2d) and nn.init.ones_(m.weight))
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)
    assert torch.equal(state['dep_conv.weight'], shift_kernel(256, 64, 3))
    for i in (1, 2, 3):
        assert state[f'conv{i}.weight'].std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
        assert not state[f'conv{i}.bias'].any()
