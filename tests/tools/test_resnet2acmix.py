"""A plain ResNet's weights as a start for ResNet-ACmix."""

import copy
import itertools

import _kernel_fit as kernel_fit
import pytest
import resnet2acmix
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from acmix_mm.backbones import ACmixResNet
from acmix_mm.layers import ACmix

PLAIN = {'depth': 26, 'base_channels': 8, 'stage_with_acmix': (False,) * 4}


def low_rank_kernel(generator, positions=4, inputs=16):
    """A kernel (O, T, I) of rank 9 in groups of 4 channels that do not lie together."""
    outer = torch.randn(positions, 4, 9, 9, dtype=torch.float64, generator=generator)
    inner = torch.randn(positions, 9, inputs, dtype=torch.float64, generator=generator)
    kernel = torch.einsum('gntr,gri->gnti', outer, inner).flatten(0, 1)
    return kernel[torch.randperm(len(kernel), generator=generator)]


def as_weight(kernel):
    """(O, 9, I) as nn.Conv2d has it."""
    return kernel.transpose(1, 2).unflatten(2, (3, 3))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize('stride', [1, 2])
def test_kernel_of_low_rank_is_exact(generator, stride):
    kernel = low_rank_kernel(generator)
    groups = kernel_fit.group_outputs(kernel, 4, 9, generator, sweeps=20)
    operator = ACmix(16, 16, stride=stride).double()
    resnet2acmix.install(operator, kernel_fit.truncate(kernel, groups, 9), generator)
    nn.init.zeros_(operator.rate1)
    x = torch.randn(2, 16, 9, 11, dtype=torch.float64)
    expected = F.conv2d(x, as_weight(kernel), stride=stride, padding=1)[:, groups.flatten()]
    torch.testing.assert_close(operator(x), expected, rtol=0, atol=1e-8)


def test_no_swap_betters_the_groups(generator):
    kernel = torch.randn(12, 9, 40, dtype=torch.float64, generator=generator)

    def beyond(groups):
        values = torch.linalg.svdvals(kernel[torch.tensor(groups)].reshape(3, 36, 40))
        return (values[:, 9:] ** 2).sum()

    groups = kernel_fit.group_outputs(kernel, 4, 9, generator, sweeps=20).tolist()
    assert sorted(itertools.chain(*groups)) == list(range(12))
    least = beyond(groups)
    assert least < beyond(torch.arange(12).view(3, 4).tolist())
    for one, other in itertools.combinations(range(3), 2):
        for i, j in itertools.product(range(4), repeat=2):
            swapped = copy.deepcopy(groups)
            swapped[one][i], swapped[other][j] = groups[other][j], groups[one][i]
            assert beyond(swapped) >= least * (1 - 1e-8)


def test_truncation_meets_the_lower_bound(generator):
    kernel = torch.randn(16, 9, 16, dtype=torch.float64, generator=generator)
    groups = torch.randperm(16, generator=generator).view(4, 4)
    error = kernel_fit.truncate(kernel, groups, 9).kernel() - kernel
    tails = 0
    for group in groups:  # squared singular values are eigenvalues of the Gram matrix
        block = kernel[group].reshape(36, 16)
        tails += torch.linalg.eigvalsh(block.T @ block)[: 16 - 9].sum()
    torch.testing.assert_close(error.square().sum(), tails)


def test_fewer_inputs_than_the_rank(generator):
    kernel = torch.randn(8, 9, 5, dtype=torch.float64, generator=generator)
    groups = torch.arange(8).view(2, 4)
    factors = kernel_fit.truncate(kernel, groups, 9)
    torch.testing.assert_close(factors.kernel(), kernel)


@pytest.fixture
def data(generator):
    """A convolution, smooth inputs whose channels are correlated, and wanted outputs."""
    conv = nn.Conv2d(12, 8, 3, stride=2, padding=1, bias=False).double()
    x = torch.randn(20, 12, 12, 12, dtype=torch.float64, generator=generator)
    mixed = torch.einsum('oi,bihw->bohw', torch.randn(12, 12, dtype=torch.float64), x)
    x = F.avg_pool2d(mixed, 3, 1, 1).relu()
    noise = 0.1 * torch.randn(20, 8, 6, 6, dtype=torch.float64, generator=generator)
    return conv, x, conv(x).detach() + noise + 3


def squared_error(kernel, conv, x, wanted):
    """Of a convolution with this kernel and the best bias, a pixel."""
    error = F.conv2d(x, as_weight(kernel), stride=conv.stride, padding=conv.padding) - wanted
    return error.transpose(0, 1).flatten(1).var(1, correction=0).sum().item()


def test_statistics_give_the_error(data, generator):
    conv, x, wanted = data
    statistics = kernel_fit.measure(conv, x, wanted)
    one, other = torch.randn(2, 8, 9, 12, dtype=torch.float64, generator=generator)
    expected = squared_error(one, *data) - squared_error(other, *data)
    assert statistics.excess(one) - statistics.excess(other) == pytest.approx(expected)
    best = statistics.best_kernel()
    least = squared_error(best, *data)
    for _ in range(5):
        other = best + 1e-2 * torch.randn(best.shape, dtype=torch.float64, generator=generator)
        assert least < squared_error(other, *data)


def test_alternating_never_raises_the_error(data):
    conv, x, wanted = data
    statistics = kernel_fit.measure(conv, x, wanted)
    kernel = conv.weight.detach().flatten(2).transpose(1, 2)
    factors = kernel_fit.truncate(kernel, torch.arange(8).view(2, 4), 5)
    errors = [squared_error(factors.kernel(), *data)]
    for _ in range(4):
        factors = kernel_fit.alternate(factors, statistics, sweeps=1)
        errors.append(squared_error(factors.kernel(), *data))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    assert errors[-1] >= squared_error(statistics.best_kernel(), *data)


@pytest.mark.parametrize('steps, solved', [(0, 'outer'), (60, 'inner')])
def test_each_factor_is_solved_for(data, steps, solved):
    """Five maps of 12 inputs are 60 unknowns: as many conjugate gradients end at the minimum."""
    conv, x, wanted = data
    statistics = kernel_fit.measure(conv, x, wanted)
    kernel = conv.weight.detach().flatten(2).transpose(1, 2)
    start = kernel_fit.truncate(kernel, torch.arange(8).view(2, 4), 5)

    def gradients(factors):
        leaves = [t.detach().requires_grad_() for t in (factors.outer, factors.inner)]
        kernel = kernel_fit.Factors(factors.groups, *leaves).kernel()
        through = torch.einsum('oti,tisj->osj', kernel, statistics.patches)
        error = ((through - 2 * statistics.outputs) * kernel).sum()
        return [g.norm().item() for g in torch.autograd.grad(error, leaves)]

    before = gradients(start.balanced())
    after = gradients(kernel_fit.alternate(start, statistics, sweeps=1, steps=steps))
    index = ('outer', 'inner').index(solved)
    assert after[index] < 1e-6 * before[index]
    assert after[1 - index] > 1e-3 * before[1 - index]


def test_adapted_norm_follows_its_input():
    norm = nn.BatchNorm2d(6).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    x = torch.randn(4, 6, 5, 5)
    with torch.no_grad():
        resnet2acmix.adapt(norm, x, x.clone(), 4)
        for name, tensor in norm.state_dict().items():
            torch.testing.assert_close(tensor, before[name])
        expected, actual = resnet2acmix.adapt(norm, x, 3 * x - 2, 4)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def scenes(count, seed):
    """Images of bars of random direction and colour; the direction is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    rows, cols = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing='ij')
    angle = labels.view(-1, 1, 1) * torch.pi / 4 + 0.2 * torch.randn(
        count, 1, 1, generator=generator
    )
    phase = 6 * torch.rand(count, 1, 1, generator=generator)
    waves = (0.6 * (rows * angle.cos() + cols * angle.sin()) + phase).sin()[:, None]
    colour = 0.5 + torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.3 * torch.randn(count, 3, 64, 64, generator=generator)
    return waves * colour + noise, labels


@pytest.fixture(scope='module')
def trained():
    """A small plain ResNet trained for some steps, and its head."""
    torch.manual_seed(0)
    network, head = ACmixResNet(**PLAIN), nn.Linear(256, 4)
    network.init_weights()
    network.train()
    optimiser = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=3e-3)
    for step in range(30):
        images, labels = scenes(16, step)
        loss = F.cross_entropy(head(network(images)[-1].mean((2, 3))), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval(), head


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Generated images as files."""
    folder = tmp_path_factory.mktemp('images')
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (resnet2acmix.MEAN, resnet2acmix.STD))
    for index, image in enumerate(scenes(30, 1000)[0]):
        pixels = (image * std + mean).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f'{index}.png')
    return folder


def convert(weights, path, *options):
    """Convert weights; returns what the tool writes."""
    torch.save(weights, path / 'plain.pth')
    out = path / f'acmix{len(list(path.iterdir()))}.pth'
    resnet2acmix.main([str(path / 'plain.pth'), str(out), *map(str, options)])
    return torch.load(out)


def load(checkpoint):
    """The network of a written checkpoint; every weight must have its place."""
    network = ACmixResNet(26, base_channels=8).eval()
    prefix = 'backbone.'
    state = checkpoint['state_dict'].items()
    network.load_state_dict(
        {name.removeprefix(prefix): v for name, v in state if name.startswith(prefix)}
    )
    return network


@torch.no_grad()
def errors(network, reference, images):
    return [
        ((out - expected).norm() / expected.norm()).item()
        for out, expected in zip(network(images), reference(images), strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize('with_images', [False, True])
def test_features_are_near_to_the_plain_networks(trained, folder, tmp_path, with_images, capsys):
    plain, _ = trained
    options = ['--images', folder, '--size', 64] if with_images else []
    network = load(convert(plain.state_dict(), tmp_path, *options))
    start = ACmixResNet(26, base_channels=8).eval()
    shared = {n: v for n, v in plain.state_dict().items() if n in start.state_dict()}
    start.load_state_dict({**start.state_dict(), **shared})
    images, _ = scenes(16, 2000)
    converted, untouched = errors(network, plain, images), errors(start, plain, images)
    for ours, theirs in zip(converted, untouched, strict=True):
        assert ours <= 0.6 * theirs
    out = capsys.readouterr().out
    assert ('ratio' in out) == with_images
    assert f'checkpoint: {tmp_path}/acmix1.pth (ACmixResNet, depth=26, base_channels=8)' in out


@torch.no_grad()
def test_everything_else_is_copied(trained, tmp_path):
    plain, _ = trained
    network = load(convert(plain.state_dict(), tmp_path))
    blocks = zip(resnet2acmix.bottlenecks(plain), resnet2acmix.bottlenecks(network), strict=True)
    for (_, theirs), (_, ours) in blocks:
        # Columns of conv3 tell in which order the operator's outputs are.
        columns = theirs.conv3.weight.flatten(1).T
        distances = (ours.conv3.weight.flatten(1).T[:, None] - columns).abs().sum(-1)
        order = distances.argmin(1)
        assert sorted(order.tolist()) == list(range(len(order)))
        assert distances.min(1).values.max() == 0
        for name, value in theirs.norm2.state_dict().items():
            assert torch.equal(ours.norm2.state_dict()[name], value[order] if value.ndim else value)
    changed = ('conv2', 'bn2', 'conv3')
    state = network.state_dict()
    same = [n for n in plain.state_dict() if not any(part in n for part in changed)]
    assert len(same) > 70
    for name in same:
        assert torch.equal(state[name], plain.state_dict()[name])


@pytest.mark.parametrize('form', ['torchvision', 'mmpretrain', 'parallel', 'detector'])
def test_forms_of_checkpoints(trained, tmp_path, form):
    plain, _ = trained
    weights, fc, neck = plain.state_dict(), torch.randn(4, 256), torch.randn(3)
    wrapped = {f'backbone.{name}': value for name, value in weights.items()}
    meta, head = {}, {'head.fc.weight': fc}
    if form == 'torchvision':
        weights = {n: v for n, v in weights.items() if 'num_batches_tracked' not in n}
        checkpoint = {**weights, 'fc.weight': fc}
    elif form == 'mmpretrain':
        checkpoint = {'state_dict': {**wrapped, 'head.fc.weight': fc}, 'optimizer': {}}
    elif form == 'parallel':
        names = {f'module.{name}': value for name, value in weights.items()}
        checkpoint = {'state_dict': {**names, 'module.fc.weight': fc}}
    else:
        head, meta = {'neck.weight': neck, 'bbox_head.fc.weight': fc}, {'dataset_meta': {'a': 1}}
        checkpoint = {'state_dict': {**wrapped, **head}, 'meta': {**meta, 'epoch': 3}}
    written = convert(checkpoint, tmp_path)
    assert written.keys() == {'state_dict', 'meta'}
    assert written['meta'] == meta
    load(written)
    others = {n: v for n, v in written['state_dict'].items() if not n.startswith('backbone.')}
    assert others.keys() == head.keys()
    assert all(torch.equal(others[name], value) for name, value in head.items())


def test_seed_and_plot(trained, tmp_path, capsys):
    weights = trained[0].state_dict()
    picture = tmp_path / 'spectra.png'
    one = convert(weights, tmp_path, '--plot', picture)['state_dict']
    assert Image.open(picture).size > (400, 300)
    assert f'plot:       {picture}' in capsys.readouterr().out
    same, other = (convert(weights, tmp_path, '--seed', s)['state_dict'] for s in (0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def without(weights, part):
    return {name: value for name, value in weights.items() if part not in name}


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda w: without(w, 'conv3'), 'has basic blocks (ResNet-18 or -34)'),
        (lambda w: {'patch_embed.weight': torch.ones(1)}, 'it has patch_embed.weight'),
        (lambda w: without(w, 'layer4'), 'it lacks layer4.0.conv3.weight'),
        (lambda w: {**w, 'layer1.0.conv2.rate1': torch.ones(1)}, 'is a mixed network already'),
        (lambda w: without(w, 'layer3.3'), 'has stages of (1, 2, 3, 1) blocks, not one of'),
        (lambda w: without(w, 'layer3.1.bn2.bias'), 'layer3.1.bn2.bias is missing'),
        (
            lambda w: {**w, 'layer1.0.conv2.weight': torch.ones(8, 2, 3, 3)},
            'layer1.0.conv2.weight has another shape',
        ),
        (lambda w: {'state_dict': {}}, 'holds no weights'),
        (
            lambda w: {**w, 'layer1.0.conv2.weight': torch.full((8, 8, 3, 3), torch.nan)},
            '1 of its 174 weights are not finite, the first is layer1.0.conv2.weight',
        ),
        (lambda w: {**w, 'code': Image.Image}, 'is refused: it holds PIL.Image.Image'),
    ],
)
def test_refused_checkpoints(trained, tmp_path, change, message):
    file, out = tmp_path / 'plain.pth', tmp_path / 'acmix.pth'
    torch.save(change(dict(trained[0].state_dict())), file)
    with pytest.raises(SystemExit) as error:
        resnet2acmix.main([str(file), str(out)])
    assert str(error.value).startswith('error: ')
    assert str(file) in str(error.value)
    assert message in str(error.value)
    assert '\n' not in str(error.value)
    assert not out.exists()


def test_channels_that_no_heads_divide(tmp_path):
    network = ACmixResNet(**{**PLAIN, 'base_channels': 6})
    torch.save(network.state_dict(), tmp_path / 'plain.pth')
    with pytest.raises(SystemExit, match='out_channels must be divisible by num_heads'):
        resnet2acmix.main([str(tmp_path / 'plain.pth'), str(tmp_path / 'acmix.pth')])


def test_refused_arguments(trained, folder, tmp_path, capsys):
    file, empty = tmp_path / 'plain.pth', tmp_path / 'empty'
    torch.save(trained[0].state_dict(), file)
    empty.mkdir()
    broken = tmp_path / 'broken'
    broken.mkdir()
    for name in 'ab':
        (broken / f'{name}.png').write_bytes(b'no image')
    for options, message in (
        ([tmp_path / 'none.pth', tmp_path / 'out.pth'], 'none.pth does not exist'),
        ([file, file], 'exists already'),
        ([file, tmp_path / 'out'], 'must end in .pth'),
        ([file, tmp_path / 'out.pth', '--plot', 'a.jpg'], 'must end in .png'),
        ([file, tmp_path / 'none' / 'out.pth'], f'folder {tmp_path / "none"} does not exist'),
        ([file, tmp_path / 'out.pth', '--images', tmp_path / 'none'], 'does not exist'),
        ([file, tmp_path / 'out.pth', '--images', empty], 'at least 2, and holds 0'),
        ([file, tmp_path / 'out.pth', '--images', broken], 'cannot be read'),
    ):
        with pytest.raises(SystemExit) as error:
            resnet2acmix.main([*map(str, options)])
        assert str(error.value).startswith('error: ')
        assert message in str(error.value)
    for option, value in (('--num-images', '1'), ('--size', '31')):
        with pytest.raises(SystemExit):
            resnet2acmix.main([str(file), str(tmp_path / 'out.pth'), option, value])
        assert f'{option} must be at least' in capsys.readouterr().err
    assert not (tmp_path / 'out.pth').exists()
