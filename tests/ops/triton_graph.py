"""Prints as JSON what torch.compile sees of the fused operator in Triton, without a GPU.

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
from acmix_mm.ops import fused_acmix  # noqa: E402
from acmix_mm.ops._dispatch import OPERATORS  # noqa: E402

torch.cuda.is_available = is_available
# Asked for the kernels' intermediate code, of which PyTorch reads what they write.
driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget('cuda', 90, 32)))
# Tensors are the CPU's: without CUDA, PyTorch has no others.
operator = OPERATORS['fused_acmix']
operator['triton'] = operator['triton']._replace(refuses=lambda *args: None)

graphs = {'forward': [], 'backward': []}


def keep(direction):
    def compiler(graph, inputs):
        graphs[direction].append(graph)
        return make_boxed_func(graph.forward)

    return compiler


@torch.compile(
    fullgraph=True, backend=aot_autograd(fw_compiler=keep('forward'), bw_compiler=keep('backward'))
)
def operate(x, *others):
    return fused_acmix(x, *others, 2, 7, backend='triton')


shapes = ((24, 6, 1, 1), (24,), (4, 2), (8, 6, 3, 3), (8,), (1,))
with FakeTensorMode():
    others = [torch.empty(shape, requires_grad=True) for shape in shapes]
    for size in ((10, 14), (21, 33)):
        x = torch.empty(1, 6, *size, requires_grad=True)
        for axis in (2, 3):
            torch._dynamo.maybe_mark_dynamic(x, axis)
        operate(x, *others).sum().backward()

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
print(
    json.dumps(
        {
            **written,
            'opaque': [name for name in opaque if 'acmix' in name],
            'recompiled': max(map(len, graphs.values())) - 1,
        }
    )
)
