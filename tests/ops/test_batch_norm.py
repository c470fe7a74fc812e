import copy
from pathlib import Path

import pytest
import torch
from norms import BATCH_NORMS, OtherForward
from processes import run_two_processes
from torch import nn

from acmix_mm.ops import reference as oracles
from acmix_mm.ops._batch_norm import batch_norm, is_batch_norm


class OtherChecks(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        return


def test_is_batch_norm():
    for norm in (*(kind(3) for kind in BATCH_NORMS), OtherChecks(3)):
        assert is_batch_norm(norm)
        assert is_batch_norm(type(norm))
    others = (OtherForward(3), nn.InstanceNorm2d(3), nn.GroupNorm(1, 3), nn.LazyBatchNorm2d())
    for norm in (*others, nn.Identity()):
        assert not is_batch_norm(norm)
        assert not is_batch_norm(type(norm))


# Operator, affine norm, momentum, dtype, images of each process.
CASES = [
    ('batch_norm', True, 0.3, torch.float64, (2, 1)),
    ('batch_norm', False, None, torch.float64, (0, 3)),
    ('norm_relu_conv', True, 0.3, torch.float64, (2, 1)),
    ('norm_relu_conv', False, None, torch.float64, (1, 2)),
    ('norm_relu_conv', True, 0.1, torch.float64, (0, 2)),
    ('norm_relu_conv', True, 0.1, torch.float32, (2, 1)),
    ('norm_relu_conv', True, 0.1, torch.bfloat16, (2, 1)),
    ('patch_weights', True, 0.3, torch.float64, (2, 1)),
    ('patch_weights', False, None, torch.float64, (3, 0)),
    ('patch_weights', True, 0.1, torch.float32, (1, 2)),
]


def make_case(name, affine, momentum, dtype, images):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, kernel_size = 3, 3
    features = channels * (1 + kernel_size**2) if name == 'patch_weights' else channels
    norm = nn.SyncBatchNorm(features, affine=affine, momentum=momentum).double()
    if affine:
        norm.weight.data, norm.bias.data = random(features), random(features)
    norm.running_mean.copy_(random(features))
    # Far from zero, where statistics are hard to get right.
    inputs = [random(sum(images), channels, 5, 6) + 3]
    kwargs = {'norm': norm}
    outputs = channels
    if name != 'batch_norm':
        outputs = 4
        kwargs['weight'] = random(outputs, features, 1, 1).requires_grad_()
    if name == 'patch_weights':
        inputs.append(random(*inputs[0].shape) - 2)
        kwargs['kernel_size'] = kernel_size
    return inputs, kwargs, random(sum(images), outputs, 5, 6)


def of_one_process(name, inputs, kwargs, grad):
    """The whole batch by PyTorch's modules, in float64."""
    kwargs = copy.deepcopy(kwargs)
    source = kwargs['norm']
    norm = nn.BatchNorm2d(source.num_features, affine=source.affine, momentum=source.momentum)
    norm.double().load_state_dict(source.state_dict())
    inputs = [t.clone().requires_grad_() for t in inputs]
    x = inputs[0]
    if name == 'patch_weights':
        index = oracles.neighbours(*inputs[1].shape[-2:], kwargs['kernel_size'], 1, 1)
        patch = inputs[1].flatten(2)[..., index].permute(0, 1, 4, 2, 3).flatten(1, 2)
        x = torch.cat([x, patch], 1)
    out = norm(x)
    parameters = list(norm.parameters())
    if name != 'batch_norm':
        out = nn.functional.conv2d(out.relu(), kwargs['weight'])
        parameters.append(kwargs['weight'])
    grads = torch.autograd.grad(out, [*inputs, *parameters], grad)
    return out.detach(), grads[: len(inputs)], grads[len(inputs) :], norm.state_dict()


@pytest.fixture(scope='module')
def of_two_processes(tmp_path_factory):
    """Of each case what each process got."""
    folder = tmp_path_factory.mktemp('synchronised')
    tasks = []
    for name, affine, momentum, dtype, images in CASES:
        inputs, kwargs, grad = make_case(name, affine, momentum, dtype, images)
        if 'weight' in kwargs:
            kwargs['weight'] = kwargs['weight'].detach().to(dtype).requires_grad_()
        if dtype != torch.float64:
            kwargs['norm'].float()
        batches = list(zip(*(t.to(dtype).split(images) for t in inputs), strict=True))
        tasks.append((name, kwargs, batches, grad.to(dtype).split(images)))
    torch.save(tasks, folder / 'cases.pth')
    program = Path(__file__).with_name('synchronised_norms.py')
    files = [folder / 'cases.pth', folder / 'results.pth']
    run_two_processes(program, *files)
    return list(zip(*torch.load(files[1]), strict=True))


@pytest.mark.parametrize(
    'case', range(len(CASES)), ids=[f'{c[0]}-{i}' for i, c in enumerate(CASES)]
)
def test_two_processes_are_one_of_the_whole_batch(of_two_processes, case):
    """Outputs, gradients of inputs, summed gradients of parameters, running statistics."""
    name, *_, dtype, images = CASES[case]
    inputs, kwargs, grad = make_case(*CASES[case])
    output, input_grads, parameter_grads, state = of_one_process(name, inputs, kwargs, grad)
    results = of_two_processes[case]
    tolerance = {
        torch.float64: {},
        torch.float32: {'rtol': 1e-4, 'atol': 1e-4},
        torch.bfloat16: {'rtol': 0.05, 'atol': 0.3},
    }[dtype]

    def compare(ours, theirs, **tolerance):
        torch.testing.assert_close(ours.double(), theirs.double(), **tolerance)

    assert results[0]['output'].dtype == dtype
    compare(torch.cat([r['output'] for r in results]), output, **tolerance)
    for i, expected in enumerate(input_grads):
        compare(torch.cat([r['grads'][i] for r in results]), expected, **tolerance)
    for i, expected in enumerate(parameter_grads, len(inputs)):
        compare(sum(r['grads'][i].double() for r in results), expected, **tolerance)
    assert [len(r['output']) for r in results] == list(images)
    for result in results:
        assert result['state'].keys() == state.keys()
        for key, value in state.items():
            compare(result['state'][key], value, **tolerance)


@pytest.mark.parametrize('training', [True, False])
def test_batch_norm_of_one_process(training):
    """nn.SyncBatchNorm is nn.BatchNorm2d there; anything else is called."""
    norm = nn.SyncBatchNorm(3).train(training)
    other = nn.BatchNorm2d(3).train(training)
    x = torch.randn(2, 3, 4, 5) + 1
    torch.testing.assert_close(batch_norm(x, norm), other(x))
    torch.testing.assert_close(norm.state_dict(), other.state_dict())
    assert batch_norm(x, nn.Identity()) is x
    torch.testing.assert_close(batch_norm(x, OtherForward(3)), 2 * nn.BatchNorm2d(3)(x))
