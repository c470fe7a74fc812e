"""Prints as JSON what torch.compile sees of the operators in Triton, without a GPU.

A program of its own, as Triton must not be in its interpreter. Tensors are fake and nothing runs.
"""

import json
import os
from types import SimpleNamespace

os.environ.pop('TRITON_INTERPRET', None)

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

is_available, torch.cuda.is_available = torch.cuda.is_available, lambda: True
from acmix_mm.ops import fused_acmix, local_aggregation, patch_weights  # noqa: E402
from acmix_mm.ops._dispatch import OPERATORS  # noqa: E402

torch.cuda.is_available = is_available
# Asked for the kernels' intermediate code, of which PyTorch reads what they write.
driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget('cuda', 90, 32)))
# Tensors are the CPU's: without CUDA, PyTorch has no others.
for name in ('fused_acmix', 'group_conv', 'local_aggregation', 'patch_weights'):
    operator = OPERATORS[name]
    operator['triton'] = operator['triton']._replace(refuses=lambda *args: None)


def compiled(function, make_inputs) -> dict:
    """Of forward and backward pass at two sizes: kernels and what they write, other operators."""
    graphs = {'forward': [], 'backward': []}

    def keep(direction):
        def compiler(graph, inputs):
            graphs[direction].append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=keep('forward'), bw_compiler=keep('backward'))
    function = torch.compile(function, fullgraph=True, backend=backend)
    with FakeTensorMode():
        for size in ((20, 28), (21, 33)):
            maps, others = make_inputs(*size)
            maps = [tensor.contiguous(memory_format=torch.channels_last) for tensor in maps]
            for tensor in maps:
                for axis in (2, 3):
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
            inputs = [tensor.requires_grad_() for tensor in (*maps, *others)]
            function(*inputs).sum().backward()

    nodes = {direction: list(found[0].graph.nodes) for direction, found in graphs.items()}
    written = {
        direction: [
            sorted(node.kwargs['tensors_to_clone'])
            for node in found
            if str(node.target) == 'triton_kernel_wrapper_functional'
        ]
        for direction, found in nodes.items()
    }
    opaque = [str(node.target) for found in nodes.values() for node in found]
    return {
        **written,
        'opaque': [name for name in opaque if 'acmix' in name],
        'recompiled': max(map(len, graphs.values())) - 1,
    }


norms = []


def of_acmix(height, width):
    shapes = ((24, 8, 1, 1), (24,), (4, 2), (8, 6, 3, 3), (8,), (1,))
    return [torch.empty(1, 8, height, width)], [torch.empty(shape) for shape in shapes]


def of_aggregation(height, width):
    return [torch.empty(1, 16, height, width), torch.empty(1, 2 * 9, height, width)], []


def aggregation(value, weight):
    return local_aggregation(value, weight.unflatten(1, (2, 9)), 3, backend='triton')


def of_weights(height, width):
    if not norms:  # which compiled graphs hold
        norms.append(torch.nn.BatchNorm2d(160).eval())
    maps = [torch.empty(1, 16, height, width) for _ in range(2)]
    return maps, [torch.empty(8, 160, 1, 1), *norms[0].parameters()]


def weights(query, key, weight, scale, shift):
    return patch_weights(query, key, weight, norms[0], 3, backend='triton')


def acmix(x, *others):
    return fused_acmix(x, *others, 2, 7, backend='triton')


print(
    json.dumps(
        {
            'fused_acmix': compiled(acmix, of_acmix),
            'local_aggregation': compiled(aggregation, of_aggregation),
            'patch_weights': compiled(weights, of_weights),
        }
    )
)
