"""Rates and energies of the paths, against the formulas of every family."""

import json
import math
import os

import pytest
import torch
from mixed_operators import CASES, acmix, patch
from torch import nn

from acmix_mm import deploy
from acmix_mm.analysis.path_bias import (
    PathEnergy,
    PathRates,
    path_energy,
    path_rates,
    path_terms,
    plot_path_bias,
    rates_of_weights,
    read_rates,
    short_names,
    table_of,
)
from acmix_mm.layers import ACmix


def model_of(**mixes: str) -> nn.Module:
    return nn.ModuleDict({name: ACmix(4, 8, mix=mix) for name, mix in mixes.items()})


def test_rates_of_every_mode():
    model = model_of(a='learned', b='complementary', c='sum', d='attention', e='conv')
    nn.init.constant_(model.a.rate1, -0.25)
    nn.init.constant_(model.a.rate2, 2.0)
    nn.init.constant_(model.b.rate1, 0.75)
    assert path_rates(model) == [
        PathRates('a', -0.25, 2.0),
        PathRates('b', 0.75, 0.25),
        PathRates('c', 1.0, 1.0, learned=False),
        PathRates('d', 1.0, 0.0, learned=False),
        PathRates('e', 0.0, 1.0, learned=False),
    ]
    a, b, c, d, e = path_rates(model)
    assert (a.ratio, b.ratio, c.ratio, d.ratio, e.ratio) == (0.125, 3.0, 1.0, math.inf, 0.0)
    assert a.log_ratio == pytest.approx(-3 * math.log(2))
    assert (d.log_ratio, e.log_ratio) == (math.inf, -math.inf)
    assert math.isnan(PathRates('', 0.0, 0.0).log_ratio)


def test_rates_are_those_that_the_operator_has():
    """Twice the rate is twice the path, in a mode where rate2 follows from rate1."""
    case = acmix(mix='complementary')
    nn.init.constant_(case.operator.rate1, 0.3)
    ((rates),) = path_rates(case.model)
    expected = rates.rate1 * case.attention + rates.rate2 * case.convolution
    bias = case.operator.bias[:, None, None]
    torch.testing.assert_close(case.run(), expected + bias)


def test_rates_of_weights_are_those_of_the_model():
    model = model_of(a='learned', b='complementary')
    nn.init.constant_(model.a.rate2, -3.0)
    nn.init.constant_(model.b.rate1, 1.25)
    assert rates_of_weights(model.state_dict()) == path_rates(model)
    bare = model.a
    assert rates_of_weights(bare.state_dict()) == path_rates(bare) == [PathRates('', 0.5, -3.0)]


@pytest.mark.parametrize('mix', ['sum', 'attention', 'conv'])
def test_weights_without_rates(mix):
    with pytest.raises(ValueError, match='weights must have learned rates, and have none'):
        rates_of_weights(model_of(a=mix).state_dict())


def test_models_without_rates():
    with pytest.raises(ValueError, match=r'must have operators that mix .*, Linear has none'):
        path_rates(nn.Linear(2, 2))
    model = model_of(first='learned').eval()
    with pytest.raises(ValueError, match='as it is trained: first is deployed, its rates are fold'):
        path_rates(deploy(model))
    with pytest.raises(ValueError, match='weights must have learned rates'):
        rates_of_weights(model.state_dict())


@pytest.mark.parametrize('name', CASES)
def test_terms_are_those_of_the_formulas(name):
    case = CASES[name]()
    operator = case.operator
    seen = []

    def keep(operator, args, kwargs, output):
        seen.append((*path_terms(operator, *args, **kwargs), output, args, kwargs))

    handle = operator.register_forward_hook(keep, with_kwargs=True)
    out = case.run()
    handle.remove()
    attention, convolution, output, args, kwargs = seen[0]
    identity = kwargs.get('identity', args[2] if len(args) > 2 else None)
    rest = identity if torch.is_tensor(identity) and identity.shape == output.shape else 0
    bias = operator.bias[:, None, None] if operator.bias is not None else 0
    torch.testing.assert_close(attention + convolution + rest + bias, output, rtol=0, atol=1e-12)
    expected = operator.rate1 * case.attention + operator.rate2 * case.convolution
    torch.testing.assert_close(out, expected + bias)


@pytest.mark.parametrize('name', [name for name in CASES if 'shifted' not in name])
def test_energies_are_mean_squares_of_the_formulas(name):
    """Not of shifted windows, as an operator's output has the padding of the map, too."""
    case = CASES[name]()
    (energy,) = path_energy(case.model, case.run)
    terms = (case.operator.rate1 * case.attention, case.operator.rate2 * case.convolution)
    squares = [term.square().mean().item() for term in (*terms, sum(terms))]
    assert (energy.attention, energy.convolution, energy.output) == pytest.approx(squares)
    assert energy.attention_share == pytest.approx(squares[0] / (squares[0] + squares[1]))


@pytest.mark.parametrize('heads', [2, 8])
@pytest.mark.parametrize('shift', [{'shift': 'tensor'}, {'shift': 'fixed'}, {'kernel_groups': 1}])
def test_terms_of_all_forms_of_the_shift(shift, heads):
    """Each term is the output where the other path has a rate of zero."""
    operator = ACmix(3, 8, num_heads=heads, **shift).double().eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    terms = path_terms(operator, x)
    for term, other in zip(terms, (operator.rate2, operator.rate1), strict=True):
        rate = other.detach().clone()
        nn.init.zeros_(other)
        torch.testing.assert_close(term, operator(x))
        assert term.abs().max() > 0
        with torch.no_grad():
            other.copy_(rate)


def test_energies_of_several_runs_are_their_mean():
    """Of maps of different sizes, every position counts the same."""
    model = nn.Sequential(ACmix(3, 8), ACmix(8, 8, mix='attention')).double().eval()
    small, large = (torch.randn(2, 3, *size, dtype=torch.float64) for size in ((2, 3), (5, 4)))
    first, second = (path_energy(model, lambda x=x: model(x)) for x in (small, large))
    both = path_energy(model, lambda: [model(small), model(large)])
    for one, other, energy in zip(first, second, both, strict=True):
        for path in ('attention', 'convolution', 'output'):
            mean = (6 * getattr(one, path) + 20 * getattr(other, path)) / 26
            assert getattr(energy, path) == pytest.approx(mean)
    assert [energy.name for energy in both] == ['0', '1']
    assert both[1].attention_share == 1
    assert both[1].convolution == 0


def test_running_for_energies_changes_nothing():
    case = patch()
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    out = case.run()
    path_energy(case.model, case.run)
    torch.testing.assert_close(case.run(), out, rtol=0, atol=0)
    torch.testing.assert_close(case.model.state_dict(), before, rtol=0, atol=0)
    assert not case.operator._forward_hooks
    assert 'mixing_weights' not in vars(case.operator)


def test_an_operator_that_is_not_called_has_no_energy():
    model = model_of(a='learned', b='learned').eval()
    a, b = path_energy(model, lambda: model.a(torch.randn(1, 4, 3, 3)))
    assert a.attention > 0
    assert math.isnan(b.attention)
    assert math.isnan(b.attention_share)
    with pytest.raises(ValueError, match='run must call the model'):
        path_energy(model, lambda: None)


def test_energies_are_refused():
    model = model_of(a='learned')
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(ValueError, match='must be in evaluation mode'):
        path_energy(model, lambda: model.a(x))
    with pytest.raises(ValueError, match='a is deployed'):
        path_energy(deploy(model.eval()), lambda: model.a(x))
    assert not model.a._forward_hooks


# Files.


def write_log(file, *lines: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))


def line(rate1: float, rate2: float, step: int) -> dict:
    return {'path_bias_rate1/a.b': rate1, 'path_bias_rate2/a.b': rate2, 'step': step}


def test_last_values_of_a_log(tmp_path):
    file = tmp_path / 'scalars.json'
    write_log(file, line(0.5, 0.5, 10), {'loss': 1.0}, line(0.25, 0.75, 20), {'loss': 0.5})
    assert read_rates(file) == ([PathRates('a.b', 0.25, 0.75)], file)


def test_newest_log_of_a_work_dir(tmp_path):
    """A resumed run has several; the last may be of an evaluation, without rates."""
    for age, (name, lines) in enumerate(
        {
            '3': [{'coco/bbox_mAP': 0.5}],
            '1': [line(0.3, 0.4, 40)],
            '2': [line(0.1, 0.2, 20)],
        }.items()
    ):
        file = tmp_path / name / 'vis_data' / 'scalars.json'
        write_log(file, *lines)
        os.utime(file, (1e9 - age, 1e9 - age))
    rates, file = read_rates(tmp_path)
    assert rates == [PathRates('a.b', 0.3, 0.4)]
    assert file == tmp_path / '1' / 'vis_data' / 'scalars.json'


def test_checkpoints(tmp_path):
    model = model_of(a='learned', b='complementary')
    nn.init.constant_(model.b.rate1, 0.125)
    for name, count in (('iter_10.pth', 10), ('iter_20.pth', 20)):
        nn.init.constant_(model.a.rate1, count / 100)
        state = {'state_dict': model.state_dict(), 'optimizer': {}, 'meta': {'iter': count}}
        torch.save(state, tmp_path / name)
    newest = [PathRates('a', pytest.approx(0.2), 0.5), PathRates('b', 0.125, 0.875)]
    assert read_rates(tmp_path) == (newest, tmp_path / 'iter_20.pth')
    older, file = read_rates(tmp_path / 'iter_10.pth')
    assert older[0].rate1 == pytest.approx(0.1)
    assert file == tmp_path / 'iter_10.pth'


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, r'log .*scalars\.json does not exist'),
        ('{"loss": 1}\n', r'log .*scalars\.json holds no rates, which PathBiasHook would write'),
        ('{"loss": 1}\n{"lo', r'log .*scalars\.json is damaged: line 2 is no JSON'),
    ],
)
def test_bad_logs(tmp_path, content, message):
    file = tmp_path / 'scalars.json'
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rates(file)


def test_bad_checkpoints(tmp_path):
    with pytest.raises(ValueError, match=r'folder .* holds no checkpoint, and no scalars\.json'):
        read_rates(tmp_path)
    with pytest.raises(ValueError, match=r'checkpoint .*none\.pth does not exist'):
        read_rates(tmp_path / 'none.pth')
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(ValueError, match=r'checkpoint .*plain\.pth: weights must have learned'):
        read_rates(tmp_path / 'plain.pth')


# The figure.


@pytest.mark.parametrize(
    ('names', 'short'),
    [
        (['backbone.layer1.0.conv2', 'backbone.layer2.3.conv2'], ['layer1.0', 'layer2.3']),
        (['x.blocks.0.1.attn', 'x.blocks.1.1.attn'], ['blocks.0.1', 'blocks.1.1']),
        (['a.b', 'a.b.c'], ['b', 'b.c']),
        (['only.one'], ['only.one']),
        (['0', '1'], ['0', '1']),
        (['a', 'b'], ['a', 'b']),
        (['', 'inner'], ['', 'inner']),
    ],
)
def test_short_names(names, short):
    assert short_names(names) == short


def runs_of(*values: tuple[float, float]) -> list[list[PathRates]]:
    return [[PathRates('x.0', a, b), PathRates('x.1', b, a)] for a, b in values]


def drawn(monkeypatch, *args, **kwargs):
    """The figure that would be written."""
    figures = []
    monkeypatch.setattr(
        'acmix_mm.analysis.path_bias.write_figure', lambda file, figure, dpi: figures.append(figure)
    )
    plot_path_bias(*args, **kwargs)
    return figures[0]


@pytest.mark.parametrize(
    ('spread', 'low', 'high'),
    [('range', (0.2, 0.4), (0.6, 0.8)), ('std', (0.4 - 0.2, 0.6 - 0.2), (0.4 + 0.2, 0.6 + 0.2))],
)
def test_means_and_spread(monkeypatch, spread, low, high):
    """Rates 0.2, 0.4 and 0.6: mean 0.4, standard deviation of the sample 0.2."""
    groups = {'three': runs_of((0.2, 0.8), (-0.4, 0.6), (0.6, -0.4)), 'one': runs_of((1.0, 2.0))}
    figure = drawn(monkeypatch, groups, 'unused.png', spread=spread)
    rate1, rate2, ratio = figure.axes
    three, one = rate1.lines[:2]
    assert three.get_ydata() == pytest.approx([0.4, 0.6])
    assert one.get_ydata() == pytest.approx([1.0, 2.0])
    band = rate1.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((min(low), max(high)))
    assert rate2.lines[0].get_ydata() == pytest.approx([0.6, 0.4])
    logs = [math.log(1 / 4), math.log(4 / 6), math.log(6 / 4)]
    assert ratio.lines[0].get_ydata() == pytest.approx([sum(logs) / 3, -sum(logs) / 3])
    labels = [text.get_text() for text in rate1.get_legend().get_texts()]
    what = {'range': 'range', 'std': 'standard deviation'}[spread]
    assert labels == [f'three: mean and {what} of 3 runs', 'one']
    assert len(rate1.collections) == 1


def test_energies_in_a_fourth_panel(monkeypatch):
    energies = {'a': [[PathEnergy('x.0', 1.0, 3.0, 4.0), PathEnergy('x.1', 3.0, 1.0, 4.0)]]}
    figure = drawn(monkeypatch, {'a': runs_of((0.5, 0.5))}, 'unused.png', energies)
    assert figure.axes[3].lines[0].get_ydata() == pytest.approx([0.25, 0.75])


def test_what_is_not_finite_is_left_out(monkeypatch):
    """A warm start has rate2 = 0."""
    figure = drawn(monkeypatch, {'a': [[PathRates('x', 1.0, 0.0)]]}, 'unused.png')
    assert all(map(math.isnan, figure.axes[2].lines[0].get_ydata()))


def test_figure_is_refused(tmp_path):
    groups = {'a': [*runs_of((1.0, 1.0)), [PathRates('x.0', 1.0, 1.0), PathRates('y', 1.0, 1.0)]]}
    with pytest.raises(ValueError, match=r'runs of a must have the same mixed .* differ in x\.1'):
        plot_path_bias(groups, tmp_path / 'a.png')
    with pytest.raises(ValueError, match=r"spread must be one of \('range', 'std'\), got 'iqr'"):
        plot_path_bias({'a': runs_of((1.0, 1.0))}, tmp_path / 'a.png', spread='iqr')
    assert not list(tmp_path.iterdir())


def test_table():
    rows = table_of(
        runs_of((0.2, 0.4), (0.4, 0.4)),
        [[PathEnergy('x.0', 1.0, 3.0, 4.0), PathEnergy('x.1', 0.0, 1.0, 1.0)]] * 2,
    )
    assert rows == [
        ('operator', '|rate1|', '|rate2|', 'log ratio', "attention's energy"),
        ('x.0', '0.300', '0.400', '-0.347', '25.0%'),
        ('x.1', '0.400', '0.300', '0.347', '0.0%'),
    ]
