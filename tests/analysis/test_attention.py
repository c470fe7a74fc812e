"""Attention weights, positions, kernels and the page, against the formulas of every family."""

import base64
import json
import math

import numpy as np
import pytest
import torch
from browser import content, open_page
from mixed_operators import CASES, acmix, patch, reduced, window
from torch import nn

from acmix_mm import deploy
from acmix_mm.analysis.attention import attentions_of, default_names, shift_kernels
from acmix_mm.analysis.attention_figures import mosaic
from acmix_mm.analysis.attention_page import (
    quantised,
    size_of_one,
    steps_of,
    stored_queries,
    write_page,
)
from acmix_mm.analysis.images import Frame
from acmix_mm.layers import ACmix
from acmix_mm.layers.mixing_weights import shift_kernel


def all_queries(attention) -> torch.Tensor:
    return stored_queries(attention, 1)


def sums_of(attention, values: torch.Tensor) -> torch.Tensor:
    """What the weights make of values (groups, channels, rows, columns), for all queries."""
    queries = all_queries(attention)
    rows, cols = (attention.keys(queries) // attention.key_size).unbind(-1)
    sums = torch.einsum('pnk,ndpk->ndp', attention.weights(queries), values[:, :, rows, cols])
    return sums.unflatten(-1, attention.query_size)


def attention_of(case):
    (attention,) = attentions_of(case.model, case.run)
    return attention


@pytest.mark.parametrize('name', CASES)
def test_weights_and_values_give_the_attention_path(name):
    """And so does the layer itself, with the rates 1 and 0."""
    case = CASES[name]()
    attention = attention_of(case)
    sums = sums_of(attention, case.values)
    if attention.size != tuple(case.values.shape[2:]) and 'Window' in name:
        full = torch.zeros_like(case.values)  # the padding has no queries
        full[..., : attention.size[0], : attention.size[1]] = sums
        sums = full
    found = case.finish(sums)[..., : attention.query_size[0], : attention.query_size[1]]
    torch.testing.assert_close(found, case.attention, rtol=0, atol=1e-10)
    nn.init.ones_(case.operator.rate1)
    nn.init.zeros_(case.operator.rate2)
    bias = case.operator.bias
    own = case.run() - (0 if bias is None else bias[:, None, None])
    torch.testing.assert_close(found, own, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', CASES)
def test_path_terms_on_the_map(name):
    case = CASES[name]()
    attention, convolution = attention_of(case).path_terms()
    torch.testing.assert_close(attention, case.operator.rate1 * case.attention)
    torch.testing.assert_close(convolution, case.operator.rate2 * case.convolution)


@pytest.mark.parametrize('name', CASES)
def test_properties_of_the_weights(name):
    attention = attention_of(CASES[name]())
    queries = all_queries(attention)
    weights = attention.weights(queries)
    keys = math.prod(attention.grid)
    assert weights.shape == (len(queries), attention.groups, keys)
    assert attention.keys(queries).shape == (len(queries), keys, 2)
    assert attention.signed == bool((weights < 0).any())
    if not attention.signed:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    own = attention.keys(queries)[torch.arange(len(queries)), attention.own(queries)]
    centre = queries * attention.stride
    last = torch.tensor(attention.grid) - 1
    if attention.key_size > 1:
        centre = torch.minimum(centre // attention.key_size, last) * attention.key_size
    torch.testing.assert_close(own, centre)


def test_a_part_of_the_queries(monkeypatch):
    """In any order, and worked off in parts."""
    attention = attention_of(acmix((6, 5), stride=2))
    queries = all_queries(attention)
    everything = attention.weights(queries)
    some = torch.tensor([5, 0, 7])
    torch.testing.assert_close(attention.weights(queries[some]), everything[some])
    monkeypatch.setattr('acmix_mm.analysis.attention.CHUNK_BYTES', 1)
    torch.testing.assert_close(attention.weights(queries), everything)


def test_what_is_beyond_the_border():
    """A corner of a 7x7 neighbourhood, by hand; padding of a window."""
    attention = attention_of(acmix((9, 9), kernel_size=7))
    corner = attention.beyond(torch.tensor([[0, 8]])).view(7, 7)
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[:3] = expected[:, 4:] = True
    torch.testing.assert_close(corner, expected)
    keys = attention.keys(torch.tensor([[0, 8]])).view(7, 7, 2)
    assert keys[0, 0].tolist() == [3, 5]
    assert keys[2, 6].tolist() == [1, 5]
    assert not attention.beyond(torch.tensor([[4, 4]])).any()

    attention = attention_of(window((7, 9), 0))  # padded to 9 rows
    assert attention.beyond(torch.tensor([[6, 0]])).view(3, 3).tolist() == [
        [False] * 3, [True] * 3, [True] * 3,
    ]  # fmt: skip


def test_keys_of_a_shifted_window():
    """The window that a shift of 1 fills from all four corners of a 6x6 map."""
    attention = attention_of(window((6, 6), 1))
    keys = attention.keys(torch.tensor([[0, 0]]))[0].tolist()
    assert keys == [[r, c] for r in (4, 5, 0) for c in (4, 5, 0)]
    weights = attention.weights(torch.tensor([[0, 0]]))[0]
    torch.testing.assert_close(weights[:, -1], torch.ones_like(weights[:, -1]))  # apart from all


def test_on_the_map():
    """A position that reflection repeats has the sum of its weights."""
    attention = attention_of(acmix((3, 4), kernel_size=7))
    query = torch.tensor([[2, 1]])
    found = attention.on_map(query)[0]
    expected = torch.zeros_like(found)
    weights = attention.weights(query)[0]
    for k, (row, col) in enumerate(attention.keys(query)[0].tolist()):
        expected[:, row, col] += weights[:, k]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(2, dtype=found.dtype))

    attention = attention_of(reduced((5, 7), 2))
    found = attention.on_map(query)
    assert found.shape == (1, 2, 3, 4)  # 2x3 keys of 2x2; a row and a column are not reduced
    torch.testing.assert_close(found[0, :, :2, :3].flatten(1), attention.weights(query)[0])
    assert not found[0, :, 2].any()
    assert not found[0, :, :, 3].any()

    attention = attention_of(window((7, 7), 0))  # padding is left out
    corner = torch.tensor([[6, 6]])
    found = attention.on_map(corner)[0]
    torch.testing.assert_close(found[:, 6, 6], attention.weights(corner)[0, :, 0])
    assert found.count_nonzero() == attention.groups


@pytest.mark.parametrize('make', [acmix, patch, reduced])
def test_of_a_batch_the_first_image(make):
    case = make(batch=2)
    attention = attention_of(case)
    sums = case.finish(sums_of(attention, case.values))
    torch.testing.assert_close(sums, case.attention, rtol=0, atol=1e-10)


def test_of_a_batch_of_windows_the_first_image():
    """The mask is of the windows of an image, not of the batch."""
    case = window(batch=2)
    attention, convolution = attention_of(case).path_terms()
    torch.testing.assert_close(attention, case.operator.rate1 * case.attention)
    torch.testing.assert_close(convolution, case.operator.rate2 * case.convolution)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = ACmix(3, 8)
        self.only_conv = ACmix(8, 8, mix='conv')
        self.last = ACmix(8, 8, stride=2)
        self.unused = ACmix(8, 8)

    def forward(self, x):
        return self.last(self.last(self.only_conv(self.first(x))))


def test_which_operators():
    model = Twice().eval()
    x = torch.randn(1, 3, 8, 8)
    first, last = attentions_of(model, lambda: model(x))
    assert (first.name, last.name) == ('first', 'last')
    assert last.size == (8, 8)  # of its first call
    assert last.query_size == (4, 4)
    assert [a.name for a in attentions_of(model, lambda: model(x), ['last'])] == ['last']
    for module in model.modules():
        assert not module._forward_pre_hooks


def test_refused():
    model = Twice().eval()
    x = torch.randn(1, 3, 8, 8)

    def run():
        return model(x)

    with pytest.raises(
        ValueError, match=r'layers must be of first, last, unused .*, got only_conv'
    ):
        attentions_of(model, run, ['last', 'only_conv'])
    with pytest.raises(ValueError, match='run must call unused, and does not'):
        attentions_of(model, run, ['unused'])
    with pytest.raises(ValueError, match='none of its mixed operators was called'):
        attentions_of(model, lambda: None)
    with pytest.raises(ValueError, match='must have finite values, the input of first has others'):
        attentions_of(model, lambda: model(x * math.nan))
    with pytest.raises(ValueError, match='must be in evaluation mode'):
        attentions_of(model.train(), run)
    with pytest.raises(ValueError, match="have operators with an attention path, all have mix='co"):
        attentions_of(model.only_conv.eval(), run)
    with pytest.raises(ValueError, match='Linear has none'):
        attentions_of(nn.Linear(2, 2), run)
    with pytest.raises(ValueError, match='first is deployed'):
        attentions_of(deploy(model.eval()), run)


def test_the_last_of_each_stage():
    layers = [ACmix(8, 8), ACmix(8, 8), ACmix(8, 8, stride=2), ACmix(8, 8), ACmix(8, 8, stride=2)]
    model = nn.Sequential(*layers).eval()
    found = attentions_of(model, lambda: model(torch.randn(1, 8, 9, 8)))
    assert default_names(found) == ['1', '3', '4']


# Kernels.


def test_shift_kernels_at_the_start():
    kernels = shift_kernels(ACmix(4, 12, num_heads=2))
    torch.testing.assert_close(kernels.initial, shift_kernel(12, 6, 3)[0])
    torch.testing.assert_close(kernels.mean, kernels.initial)
    assert kernels.change.count_nonzero() == 0
    assert kernels.relative_change == 0


def test_learned_shift_kernels():
    operator = ACmix(4, 12, num_heads=2)
    learned = operator.dep_conv['weight'].detach()
    learned += torch.randn_like(learned)
    kernels = shift_kernels(operator)
    initial = shift_kernel(12, 6, 3)
    torch.testing.assert_close(kernels.mean, learned.mean(0))
    torch.testing.assert_close(kernels.change, (learned - initial).pow(2).mean(0).sqrt())
    relative = ((learned - initial).pow(2).sum() / initial.pow(2).sum()).sqrt().item()
    assert kernels.relative_change == pytest.approx(relative)
    fc = operator.fc['weight'].detach().flatten(1) * 0.5  # rate2
    folded = torch.einsum('oipq,im->ompq', learned, fc)
    torch.testing.assert_close(kernels.folded.flatten(0, 1), folded.pow(2).mean(0).sqrt())
    assert (kernels.row_names, kernels.column_names) == (('q', 'k', 'v'), ('1', '2'))


def test_maps_of_patchwise_attention():
    """Query, key and four groups of values."""
    kernels = shift_kernels(patch().operator)
    assert kernels.folded.shape == (1, 6, 3, 3)
    assert kernels.column_names == ('q', 'k', 'v1', 'v2', 'v3', 'v4')


def test_operators_without_learned_kernels():
    assert shift_kernels(ACmix(4, 8, mix='attention')) is None
    with pytest.raises(ValueError, match='operator is deployed'):
        shift_kernels(deploy(ACmix(4, 8)))


def test_mosaic():
    kernels = np.arange(12.0).reshape(3, 2, 2)
    nan = np.nan
    expected = [[0, 1, nan, 4, 5], [2, 3, nan, 6, 7], [nan] * 5, [8, 9, *[nan] * 3],
                [10, 11, *[nan] * 3]]  # fmt: skip
    np.testing.assert_equal(mosaic(kernels, 2), expected)


# Positions.


def test_cells():
    """An image of 40x60 (height, width) at half its size in an input of 32x32, by hand."""
    frame = Frame((40, 60), (20, 30), (32, 32), (0.5, 0.5))
    assert frame.cell(0, 0, (32, 32)) == (0, 0)
    assert frame.cell(59, 39, (32, 32)) == (19, 29)
    assert frame.cell(59, 39, (8, 8)) == (4, 7)
    assert frame.cell(31, 7, (8, 8)) == (0, 3)
    assert frame.cell(32, 8, (8, 8)) == (1, 4)
    with pytest.raises(ValueError, match='point 60,0 must be in the image, x from 0 to 59 and y f'):
        frame.cell(60, 0, (8, 8))


def test_cells_of_a_crop():
    """From 32x32 pixels the middle 16x16."""
    frame = Frame((32, 32), (16, 16), (16, 16), origin=(8.0, 8.0))
    assert frame.cell(8, 23, (16, 16)) == (15, 0)
    assert frame.to_image(*frame.to_input(11.5, 3.0)) == (11.5, 3.0)
    with pytest.raises(ValueError, match='x from 8 to 23 and y from 8 to 23'):
        frame.cell(7, 8, (16, 16))


# The page.


@pytest.mark.parametrize('signed', [False, True])
def test_quantised(signed):
    weights = torch.rand(5, 3, 49) - (0.5 if signed else 0)
    weights[1, 1] = 0
    steps, scales = quantised(weights, signed)
    assert steps.dtype == np.uint8
    values = steps.view(np.int8) / 127 if signed else steps / 255
    error = np.abs(values * scales[..., None] - weights.numpy())
    assert (error <= scales[..., None] / (254 if signed else 510) * 1.001).all()
    np.testing.assert_allclose(scales, weights.abs().amax(-1))


def test_steps():
    """Positions are left out of the largest layers first, and only where there are too many."""
    model = nn.Sequential(ACmix(8, 8), ACmix(8, 8, stride=4)).eval()
    layers = attentions_of(model, lambda: model(torch.randn(1, 8, 32, 32)))
    one = size_of_one(layers[0])
    assert one == 4 * (49 + 4)
    assert steps_of(layers, (32 * 32 + 8 * 8) * one) == [1, 1]
    assert steps_of(layers, (32 * 32 + 8 * 8) * one - 1) == [2, 1]
    assert steps_of(layers, 2 * 8 * 8 * one) == [4, 1]
    assert steps_of(layers, 1) == [32, 8]


def test_stored_queries():
    attention = attention_of(acmix((5, 7)))
    found = stored_queries(attention, 4)
    assert found.tolist() == [[2, 2], [2, 6], [4, 2], [4, 6]]


@pytest.fixture
def page_of(tmp_path):
    """The data in a page for one attention."""

    def write(attention, **settings):
        image = np.zeros((8, 6, 3), np.uint8)
        frame = Frame((8, 6), (8, 6), (8, 6))
        file = tmp_path / 'page.html'
        arguments = {'title': 'a title', 'of_layers': 3, 'figures': [], **settings}
        write_page([attention], image, frame, (2, 3), file=file, **arguments)
        text = file.read_text()
        start = text.index('type="application/json">') + len('type="application/json">')
        return text, json.loads(text[start : text.index('</script>', start)])

    return write


@pytest.mark.parametrize('make', [acmix, patch, reduced, window])
def test_weights_in_the_page(page_of, make):
    attention = attention_of(make())
    _, data = page_of(attention)
    (layer,) = data['layers']
    shape = (*attention.query_size, attention.groups, math.prod(attention.grid))
    dtype = np.int8 if attention.signed else np.uint8
    steps = np.frombuffer(base64.b64decode(layer['weights']), dtype).reshape(shape)
    scales = np.frombuffer(base64.b64decode(layer['scales']), np.float32).reshape(shape[:-1])
    weights = steps / (127 if attention.signed else 255) * scales[..., None]
    expected = attention.weights(all_queries(attention)).numpy().reshape(shape)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=scales.max() / 250)
    assert data['extent'].startswith('1 of the 3 mixed operators with attention (--layers')
    assert data['point'] == [2, 3]


def test_the_page_needs_nothing_else(page_of):
    text, data = page_of(attention_of(acmix()), title='</script><b>&amp; bold')
    assert data['title'] == '</script><b>&amp; bold'
    assert text.count('</script>') == 2  # those of the template
    assert data['image'].startswith('data:image/png;base64,')
    for outside in ('http://', 'https://', '//cdn', 'src="', '@import', 'url('):
        assert outside not in text


EVERYTHING = """
const all = [];
const [layer] = data.layers;
for (let row = 0; row < layer.queries[0]; row++) {
  for (let col = 0; col < layer.queries[1]; col++) {
    const {keys, own} = keysOf(layer, row, col);
    const weights = weightsOf(layer, row, col).map((w) => Array.from(w));
    all.push([keys.map((k) => [k.row, k.col, k.beyond]), own, weights]);
  }
}
report(all);
"""


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_every_position_in_a_browser(page_of, tmp_path, name):
    """Keys, which of them are beyond the border, and weights, as the page's own functions say."""
    attention = attention_of(CASES[name]())
    page_of(attention)
    found = json.loads(content(open_page(tmp_path / 'page.html', script=EVERYTHING), 'report'))
    queries = all_queries(attention)
    weights, own = attention.weights(queries), attention.own(queries).tolist()
    keys, beyond = attention.keys(queries).tolist(), attention.beyond(queries).tolist()
    for i, (found_keys, found_own, found_weights) in enumerate(found):
        assert found_keys == [[*k, b] for k, b in zip(keys[i], beyond[i], strict=True)]
        assert found_own == own[i]
        limit = weights[i].abs().max().item() / 200
        np.testing.assert_allclose(found_weights, weights[i], rtol=0, atol=limit)
    assert len(found) == len(queries)
