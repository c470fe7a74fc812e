"""Compiles the Triton kernels for an NVIDIA GPU of compute capability 9.0, without having one.

The interpreter, in which the other tests run them, accepts much that the compiler does not. Goes
through the operators themselves, up to where a compiled kernel would be launched. Not a test
module: it needs a process of its own, in which Triton is not interpreted.
"""

import sys
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

compiled = []


def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled.append(f'{self.__name__}: {kernel.asm["ptx"].count("mma")} matrix instructions')


run, JITFunction.run = JITFunction.run, compile_only
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
)
torch.cuda.is_available = lambda: True
torch.use_deterministic_algorithms(True)  # no tuning

from acmix_mm.ops.backends import triton_backend  # noqa: E402

# The last: which gradients are computed.
all_needed = (True, True, True)
for dtype, dim, kernel_size, stride, dilation, needs in (
    (torch.float16, 16, 7, 1, 1, (all_needed, (False, True, False), (True, False, True))),
    (torch.float32, 24, 5, 3, 2, (all_needed,)),
):
    key = torch.zeros(1, 2, dim, 12, 10, dtype=dtype)
    query = key[..., ::stride, ::stride]
    geometry = (kernel_size, stride, dilation, 0.5)
    output, lse = triton_backend._forward(query, key, key, *geometry)
    for needed in needs:
        triton_backend._backward(output, query, key, key, output, lse, *geometry, needed)
print(*compiled, sep='\n')
# Each kernel twice, but those that fold.
sys.exit(len(compiled) != (2 + 5 + 3 + 5) + (2 + 5))
