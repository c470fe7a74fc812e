"""The formulations that ours are measured against compute the same."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from acmix_mm.analysis import operators
from acmix_mm.analysis.baselines import NATTEN, FlexAttention, UnfoldACmix, UnfoldPatchACmix
from acmix_mm.analysis.operators import build_attention
from acmix_mm.analysis.steps import Case, Unavailable
from acmix_mm.layers import ACmix, PatchACmix
from acmix_mm.ops import local_attention
from acmix_mm.ops import reference as oracles

UNFOLDED = {
    'ACmix': (ACmix, UnfoldACmix, (16, 16), {}),
    'ACmix, stride': (ACmix, UnfoldACmix, (16, 16), {'stride': 2}),
    'PatchACmix': (PatchACmix, UnfoldPatchACmix, (64, 16, 4), {}),
}


@pytest.mark.parametrize('name', UNFOLDED)
def test_unfold_formulation_is_the_same_operator(name):
    """The benchmark compares equals: same outputs and gradients from the same weights."""
    *classes, arguments, options = UNFOLDED[name]
    ours, unfolded = (kind(*arguments, **options).double() for kind in classes)
    unfolded.load_state_dict(ours.state_dict())
    x = torch.randn(2, arguments[0], 10, 12, dtype=torch.float64)
    torch.testing.assert_close(unfolded(x), ours(x))
    for module in (ours, unfolded):
        module(x).square().sum().backward()
    for a, b in zip(ours.parameters(), unfolded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.fixture
def eager(monkeypatch):
    """FlexAttention as plain torch, for what is compiled takes a minute."""
    monkeypatch.setattr(torch, 'compile', lambda function, **options: function)


@pytest.mark.parametrize('size', [(13, 18), (7, 40), (2, 3)])
def test_flex_attention_is_the_same(eager, size):
    """The mask has the blocks with neighbours, no others; reflection is as often as needed."""
    maps = [torch.randn(1, 2, 8, *size, dtype=torch.float64) for _ in range(3)]
    flex = FlexAttention(Case(maps[0].shape, train=False), 7)
    sequences = [flex.arrange(m) for m in maps]
    torch.testing.assert_close(flex.restore(sequences[0]), maps[0])
    torch.testing.assert_close(flex.restore(flex(*sequences)), oracles.local_attention(*maps, 7))

    queries, keys = size[0] * size[1], (size[0] + 6) * (size[1] + 6)
    neighbours = flex.mask.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys))
    assert (neighbours.sum(1) == 49).all()
    pairs = F.pad(neighbours, (0, -keys % 128, 0, -queries % 128))
    needed = pairs.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
    assert torch.equal(flex.mask.to_dense()[0, 0].bool(), needed)


@pytest.mark.slow
def test_compiled_flex_attention_is_the_same():
    """The build would fail otherwise."""
    build_attention('FlexAttention', None, Case((1, 2, 16, 13, 18), train=False))()


def shifted_attention(query, key, value, kernel_size):
    """natten.na2d as documented: near the border, neighbourhoods are moved into the map."""
    _, height, width, _, dim = query.shape
    out = torch.empty_like(query)
    for y in range(height):
        for x in range(width):
            top, left = (
                min(max(place - kernel_size // 2, 0), size - kernel_size)
                for place, size in ((y, height), (x, width))
            )
            window = (slice(None), slice(top, top + kernel_size), slice(left, left + kernel_size))
            keys, values = key[window].flatten(1, 2), value[window].flatten(1, 2)
            weights = torch.einsum('bnd,bknd->bkn', query[:, y, x], keys).div(dim**0.5).softmax(1)
            out[:, y, x] = torch.einsum('bkn,bknd->bnd', weights, values)
    return out


@pytest.mark.parametrize('size', [(9, 12), (2, 3)])
def test_natten_is_the_same(monkeypatch, size):
    """Reflected and cropped, neighbourhoods moved inwards are ours."""
    package = SimpleNamespace(na2d=shifted_attention, HAS_LIBNATTEN=False)
    monkeypatch.setitem(sys.modules, 'natten', package)
    maps = [torch.randn(2, 2, 4, *size, dtype=torch.float64) for _ in range(3)]
    natten = NATTEN(Case(maps[0].shape, train=False), 7)
    out = natten.restore(natten(*map(natten.arrange, maps)))
    torch.testing.assert_close(out, oracles.local_attention(*maps, 7))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_installed_natten_is_the_same(dtype):
    pytest.importorskip('natten')
    build_attention('NATTEN', None, Case((1, 2, 16, 9, 12), train=False, dtype=dtype))()


@pytest.mark.parametrize(
    ('rival', 'case', 'package', 'reason'),
    [
        (FlexAttention, Case((1, 2, 8, 9, 9), True), None, 'no backward on CPUs'),
        (NATTEN, Case((1, 2, 8, 9, 9), False), None, 'not installed'),
        (NATTEN, Case((1, 2, 8, 9, 9), True), SimpleNamespace(), 'no backward on CPUs'),
        (NATTEN, Case((1, 4, 8, 100, 152), False), SimpleNamespace(), 'too large without kernels'),
        (
            NATTEN,
            Case((1, 2, 8, 9, 9), False, device='cuda'),
            SimpleNamespace(HAS_LIBNATTEN=False),
            'built without kernels',
        ),
    ],
)
def test_what_cannot_be_measured(monkeypatch, rival, case, package, reason):
    monkeypatch.setitem(sys.modules, 'natten', package)
    with pytest.raises(Unavailable, match=reason):
        rival(case, 7)


@pytest.mark.parametrize('train', [False, True])
def test_other_results_are_not_measured(monkeypatch, train):
    """Nor other gradients."""

    def wrong(query, key, value, kernel_size):
        out = local_attention(query, key, value, kernel_size)
        return out.detach() + 1.1 * (out - out.detach()) if train else 1.1 * out

    monkeypatch.setattr(operators, 'unfold_attention', wrong)
    with pytest.raises(ArithmeticError, match='must be those of local_attention'):
        build_attention('unfold', None, Case((1, 2, 8, 9, 12), train))
