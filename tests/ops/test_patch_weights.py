import copy

import pytest
import torch
from devices import needs_native
from hypothesis import given, settings
from hypothesis import strategies as st
from norms import BATCH_NORMS, OtherForward
from torch import nn

from acmix_mm.ops import available_backends, patch_weights
from acmix_mm.ops import reference as oracles
from acmix_mm.ops.backends import native_backend

BACKENDS = [backend for backend in available_backends() if backend != 'triton']
every_backend = pytest.mark.parametrize('backend', BACKENDS)


def modules(channels, kernel_size, outputs=4, **norm):
    norm = nn.BatchNorm2d(channels * (1 + kernel_size**2), **norm).double()
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if norm.track_running_stats:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return norm, nn.Conv2d(norm.num_features, outputs, 1, bias=False).double()


def unfolded(query, key, conv, norm, kernel_size, stride, dilation):
    """What the function is defined as, with the patch in memory."""
    index = oracles.neighbours(*key.shape[-2:], kernel_size, stride, dilation)
    patch = key.flatten(2)[..., index].permute(0, 1, 4, 2, 3).flatten(1, 2)
    return conv(norm(torch.cat([query, patch], 1)).relu())


@every_backend
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize(
    ('size', 'kernel_size', 'stride', 'dilation', 'norm'),
    [
        ((6, 9), 7, 1, 1, {}),
        ((5, 8), 3, 2, 1, {'momentum': None}),
        ((7, 4), 3, 1, 3, {'eps': 1e-3, 'momentum': 0.3}),
        ((1, 2), 7, 1, 1, {}),
        ((4, 5), 3, 1, 1, {'track_running_stats': False}),
        ((4, 5), 3, 1, 1, {'affine': False}),
    ],
)
def test_equals_its_definition(size, kernel_size, stride, dilation, norm, training, backend):
    """Outputs, all gradients and running statistics."""
    norm, conv = modules(3, kernel_size, **norm)
    norm.train(training)
    key = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    query = torch.randn_like(key)[..., ::stride, ::stride].contiguous().requires_grad_()
    other = copy.deepcopy(norm)
    inputs = (query, key, conv.weight, *norm.parameters())
    geometry = (kernel_size, stride, dilation)
    expected = unfolded(query, key, conv, other, *geometry)
    out = patch_weights(query, key, conv.weight, norm, *geometry, backend)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    theirs = torch.autograd.grad(expected, (query, key, conv.weight, *other.parameters()), grad)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), theirs)
    assert norm.state_dict().keys() == other.state_dict().keys()
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


@every_backend
@settings(deadline=None)
@given(
    kind=st.sampled_from(BATCH_NORMS),
    training=st.booleans(),
    affine=st.booleans(),
    bias=st.booleans(),
    tracked=st.booleans(),
    counted=st.booleans(),
    momentum=st.sampled_from([None, 0.3]),
    batch=st.integers(0, 2),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    with_gradients=st.booleans(),
)
def test_any_norm_and_batch(
    backend, kind, training, affine, bias, tracked, counted, momentum, batch, size, with_gradients
):  # fmt: skip
    """As the modules, or refused as by them: one value a channel, where the batch's are taken."""
    norm = kind(20, affine=affine, track_running_stats=tracked, momentum=momentum)
    norm.double().train(training)
    if not bias:
        norm.register_parameter('bias', None)
    if not counted and kind is not nn.SyncBatchNorm:  # whose own forward insists
        norm.num_batches_tracked = None
    other, conv = copy.deepcopy(norm), nn.Conv2d(20, 4, 1, bias=False).double()
    query, key = (
        torch.randn(batch, 2, *size, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    with torch.set_grad_enabled(with_gradients):
        try:
            expected = unfolded(query, key, conv, other, 3, 1, 1)
        except ValueError:
            with pytest.raises(ValueError, match='more than 1 value per channel'):
                patch_weights(query, key, conv.weight, norm, 3, backend=backend)
            return
        out = patch_weights(query, key, conv.weight, norm, 3, backend=backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(norm.state_dict(), other.state_dict())
    if with_gradients:
        grad = torch.randn_like(out)
        inputs = (query, key, conv.weight)
        ours = torch.autograd.grad(out, (*inputs, *norm.parameters()), grad)
        theirs = torch.autograd.grad(expected, (*inputs, *other.parameters()), grad)
        torch.testing.assert_close(ours, theirs)


def test_statistics_are_those_of_the_forward_pass():
    """Whatever happens to the norm between forward and backward pass, gradients are not wrong."""
    norm, conv = modules(2, 3)
    key = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    expected, out = (patch_weights(key, key, conv.weight, norm, 3) for _ in range(2))
    (expected,) = torch.autograd.grad(expected.square().sum(), key)
    norm.eval()
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), key)[0], expected)


@pytest.mark.parametrize('training', [True, False])
def test_half_precision(training):
    """bfloat16 maps and weights, the norm in float32: within its rounding of float64."""
    norm, conv = modules(2, 3)
    norm.train(training)
    key = torch.randn(2, 2, 6, 7, dtype=torch.bfloat16)
    weight = conv.weight.bfloat16().detach()
    grad = torch.randn(2, 4, 6, 7, dtype=torch.bfloat16)
    conv.weight.data.copy_(weight)
    double = key.double().requires_grad_()
    (expected,) = torch.autograd.grad(
        unfolded(double, double, conv, copy.deepcopy(norm), 3, 1, 1), double, grad.double()
    )
    key.requires_grad_()
    out = patch_weights(key, key, weight, norm.float(), 3)
    assert out.dtype == torch.bfloat16
    (ours,) = torch.autograd.grad(out, key, grad)
    assert (ours - expected).norm() < 0.02 * expected.norm()


def test_backward_in_autocast():
    """Of a forward pass in float32 it is one in float32."""
    norm, conv = modules(2, 3)
    key = torch.randn(2, 2, 6, 7, requires_grad=True)
    norm.float(), conv.float()
    outs = [patch_weights(key, key, conv.weight, norm, 3) for _ in range(2)]
    (expected,) = torch.autograd.grad(outs[0].square().sum(), key)
    with torch.autocast('cpu', torch.bfloat16):
        (ours,) = torch.autograd.grad(outs[1].square().sum(), key)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('momentum', [None, 0.1])
def test_meta(training, momentum):
    norm, conv = modules(2, 3, momentum=momentum)
    norm.train(training).to('meta')
    key = torch.empty(2, 2, 6, 7, device='meta', dtype=torch.float64, requires_grad=True)
    out = patch_weights(key, key, conv.to('meta').weight, norm, 3)
    assert out.shape == (2, 4, 6, 7)
    out.sum().backward()
    assert key.grad.shape == key.shape


@needs_native
@settings(deadline=None)
@given(
    training=st.booleans(),
    batch=st.integers(0, 3),
    channels=st.integers(1, 9),
    outputs=st.integers(1, 35),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)),
    kernel_size=st.sampled_from([1, 3, 5, 7, 9]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
def test_native_patch_weights(
    training, batch, channels, outputs, size, kernel_size, stride, dilation
):
    """Results, gradients and running statistics: against the definition, every width of a tile."""
    norm, conv = modules(channels, kernel_size, outputs)
    norm.train(training and batch * size[0] * size[1] > 4 * stride**2)
    other = copy.deepcopy(norm)
    key = torch.randn(batch, channels, *size, dtype=torch.float64, requires_grad=True)
    query = torch.randn_like(key)[..., ::stride, ::stride].requires_grad_()
    geometry = (kernel_size, stride, dilation)
    expected = unfolded(query, key, conv, other, *geometry)
    out = patch_weights(query, key, conv.weight, norm, *geometry, 'native')
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(norm.state_dict(), other.state_dict())
    grad, inputs = torch.randn_like(out), (query, key, conv.weight)
    ours = torch.autograd.grad(out, (*inputs, *norm.parameters()), grad)
    theirs = torch.autograd.grad(expected, (*inputs, *other.parameters()), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        out = patch_weights(query, key, conv.weight, other, *geometry, 'native')
    torch.testing.assert_close(out, expected)


def off_zero(norm, query, key, kernel_size, margin):
    """False where a number before a ReLU is nearer to 0: rounding would decide gradients."""
    index = oracles.neighbours(*key.shape[-2:], kernel_size, 1, 1)
    patch = key.flatten(2)[..., index].permute(0, 1, 4, 2, 3).flatten(1, 2)
    return (norm(torch.cat([query, patch], 1)).abs() > margin).all(1, keepdim=True)


@needs_native
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_native_rounding_of_each_dtype(dtype, training):
    """Far from zero, where the gradients of the norm are differences of large sums."""
    norm, conv = modules(2, 3, 5)
    norm.train(training)
    norm.running_mean += 30
    query, key = ((torch.randn(2, 2, 24, 40) + 30).to(dtype) for _ in range(2))
    leaves = [t.double().requires_grad_() for t in (query, key)]
    conv.weight.data = conv.weight.data.to(dtype).double()
    exact = copy.deepcopy(norm)
    keep = off_zero(copy.deepcopy(norm), *leaves, 3, 1e-4)
    grad = (torch.randn(2, 5, 24, 40) * keep).to(dtype)
    parameters = (conv.weight, *exact.parameters())
    expected = unfolded(*leaves, conv, exact, 3, 1, 1)
    theirs = torch.autograd.grad(expected, (*leaves, *parameters), grad.double())
    tensors = [query.requires_grad_(), key.requires_grad_()]
    weight = conv.weight.detach().to(dtype).requires_grad_()
    norm.float()
    out = patch_weights(*tensors, weight, norm, 3, backend='native')
    ours = torch.autograd.grad(out, (*tensors, weight, *norm.parameters()), grad)
    assert out.dtype == ours[0].dtype == ours[1].dtype == dtype
    for result, right in zip((out, *ours), (expected, *theirs), strict=True):
        error = (result.double() - right).abs().max() / right.abs().max()
        assert error < max(4 * torch.finfo(result.dtype).eps, 2e-5)


@needs_native
def test_native_in_autocast():
    """As the convolution that it takes in: of its dtype."""
    norm, conv = modules(2, 3)
    norm.float().eval(), conv.float()
    key = torch.randn(2, 2, 6, 7, requires_grad=True)
    plain = patch_weights(key, key, conv.weight, norm, 3)
    with torch.autocast('cpu', torch.bfloat16):
        out = patch_weights(key, key, conv.weight, norm, 3, backend='native')
        assert out.dtype == patch_weights(key, key, conv.weight, norm, 3, backend='torch').dtype
    torch.testing.assert_close(out.float(), plain, rtol=2**-7, atol=1e-3)


@needs_native
@pytest.mark.parametrize('training', [True, False])
def test_native_repeats_bit_for_bit(training):
    """Two runs, and runs with other numbers of threads."""
    norm, conv = modules(9, 5, 6)
    norm.float().train(training), conv.float()
    query, key = (torch.randn(2, 9, 21, 37, requires_grad=True) for _ in range(2))
    leaves = (query, key, conv.weight, *norm.parameters())
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            out = patch_weights(query, key, conv.weight, norm, 5, backend='native')
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({0: torch.ones(1, 2, 5, 5)}, r'query must have shape \[1, 2, 5, 6\]'),
        ({0: torch.ones(1, 2, 5, 6).long()}, 'query must be a floating-point tensor'),
        ({1: torch.ones(1, 2, 7, 8).double()}, 'padded must be of dtype'),
        ({1: torch.ones(2, 7, 8)}, 'padded and weight must have 4 and 2 dimensions'),
        ({2: torch.ones(18)}, r'mean must have shape \[20\]'),
        ({3: torch.ones(20).half()}, 'factor must be of dtype'),
        ({4: torch.ones(1, 20)}, r'shift must have shape \[20\]'),
        ({5: torch.ones(18, 4)}, r'weight must have shape \[20, 4\]'),
        ({6: 9}, 'padded must have more rows and columns'),
        ({7: 0}, 'must be positive'),
    ],
)
def test_native_refuses(change, message):
    vectors = [torch.ones(20) for _ in range(3)]
    maps = torch.ones(1, 2, 5, 6), torch.ones(1, 2, 7, 8)
    arguments = [*maps, *vectors, torch.ones(20, 4), 3, 1, 1]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.acmix_mm.patch_weights_native(*arguments)


@needs_native
@pytest.mark.parametrize('training', [True, False])
def test_native_is_taken(monkeypatch, training):
    norm, conv = modules(2, 3)
    norm.train(training)
    key = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    calls = []
    kernel = native_backend.patch_weights
    monkeypatch.setattr(native_backend, 'patch_weights', lambda *a: calls.append(a) or kernel(*a))
    ours = patch_weights(key, key, conv.weight, norm, 3)
    assert len(calls) == 1
    torch.testing.assert_close(ours, patch_weights(key, key, conv.weight, norm, 3, backend='torch'))
    with torch.no_grad():
        patch_weights(key, key, conv.weight, norm, 3)
    assert len(calls) == 2


@every_backend
def test_training_keeps_nothing_of_the_patchs_size(backend):
    norm, conv = modules(8, 7)
    query, key = (torch.randn(1, 8, 40, 40).double().requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        patch_weights(query, key, conv.weight, norm, backend=backend)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    patch = 49 * key.numel() * key.element_size()
    assert sum(sizes.values()) < patch / 5


MAP = (1, 3, 5, 6)
NORM = r'norm must be nn.BatchNorm2d or nn.SyncBatchNorm, with its forward, of 30 channels, got '


@pytest.mark.parametrize(
    ('query', 'key', 'weight', 'norm', 'message'),
    [
        (
            (1, 3, 5, 5),
            MAP,
            (4, 30, 1, 1),
            nn.BatchNorm2d(30),
            r'query must have shape \(1, 3, 5, 6',
        ),
        (MAP, MAP[1:], (4, 30, 1, 1), nn.BatchNorm2d(30), r'key must have shape .* got \(3, 5, 6'),
        (MAP, (1, 3, 0, 6), (4, 30, 1, 1), nn.BatchNorm2d(30), 'key must have shape .* H, W >= 1'),
        (MAP, MAP, (4, 27, 1, 1), nn.BatchNorm2d(30), r'weight must have shape \(O, 30, 1, 1\)'),
        (MAP, MAP, (4, 30), nn.BatchNorm2d(30), r'weight must have shape .* got \(4, 30\)'),
        (MAP, MAP, (4, 30, 1, 1), nn.BatchNorm2d(27), NORM + 'BatchNorm2d of 27'),
        (MAP, MAP, (4, 30, 1, 1), OtherForward(30), NORM + 'OtherForward of 30'),
        (MAP, MAP, (4, 30, 1, 1), nn.Sequential(nn.ReLU()), NORM + 'Sequential of unknown'),
        (MAP, MAP, (4, 30, 1, 1), nn.BatchNorm3d(30), 'expected 5D input'),
    ],
)
def test_wrong_arguments(query, key, weight, norm, message):
    with pytest.raises(ValueError, match=message) as error:
        patch_weights(torch.zeros(query), torch.zeros(key), torch.zeros(weight), norm, 3)
    assert '\n' not in str(error.value)
