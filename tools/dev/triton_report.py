"""What Triton's compiler makes of the kernels, without a GPU.

Calls the operators as a GPU would have them called, up to where a compiled kernel would be
launched, and prints a Markdown table: for each kernel, compute capability, dtype and head dimension
of attention, or operator and layout, the registers of a thread, the bytes that it spills, loads
from and stores to global memory by their width, matrix instructions and shared memory. These are
counts of instructions in the program, not of their executions, and no times.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace

os.environ.pop('TRITON_INTERPRET', None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

torch.cuda.is_available = lambda: True  # asked by the backend when it is imported

from acmix_mm.ops.backends import (  # noqa: E402
    triton_backend,
    triton_group_conv,
    triton_local_aggregation,
    triton_patch_weights,
)

INPUTS = ('query', 'key', 'value')
# 'float32' is without TF32.
DTYPES = {
    'float16': torch.float16,
    'bfloat16': torch.bfloat16,
    'float32': torch.float32,
    'tf32': torch.float32,
}
BIN = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels last': torch.channels_last}
COLUMNS = (
    'kernel', 'capability', 'dtype', 'd or operator', 'registers', 'spilled bytes', 'loads',
    'stores', 'matrix instructions', 'shared memory',
)  # fmt: skip


def widths(pattern: str, ptx: str) -> str:
    """Counts of accesses by their bytes, widest first."""
    counts = Counter()
    for match in re.finditer(pattern, ptx):
        vector, bits, size = match.groups(default='')
        counts[int(size, 16) if size else int(vector or 1) * int(bits) // 8] += 1
    return ', '.join(f'{n} x {width}' for width, n in sorted(counts.items(), reverse=True))


def resources(cubin: bytes) -> tuple[str, str]:
    """Registers of a thread, and its bytes on the stack, where only what is spilled lies."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        command = [BIN / 'cuobjdump', '--dump-resource-usage', file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.search(r'REG:(\d+) STACK:(\d+)', text).groups()


def properties(kernel) -> dict[str, str | int]:
    """The columns that depend on a compiled kernel."""
    ptx = kernel.asm['ptx']
    registers, spilled = resources(kernel.asm['cubin'])
    access = r'{}\.global(?:\.[a-z_:0-9]*[a-z_:])*?(?:\.v(\d))?\.[bufs](\d+){}'
    copies = r'|cp\.async\.c[ag]\.shared\.global\s*\[[^]]*\],\s*\[[^]]*\],\s*0x([0-9a-f]+)'
    products = re.findall(r'\b(wgmma|mma)\S*?\.f32\.(tf32|b?f16)', ptx)
    return {
        'registers': registers,
        'spilled bytes': spilled,
        'loads': widths(access.format(r'\bld', copies), ptx),
        'stores': widths(access.format(r'\bst', '()'), ptx),
        'matrix instructions': ', '.join(
            f'{n} {instruction} {dtype}' for (instruction, dtype), n in Counter(products).items()
        ),
        'shared memory': kernel.metadata.shared,
    }


def compiled(
    capability: int, dtype: str, call: Callable[[torch.dtype], None], careful: bool = False
) -> list[tuple[str, object]]:
    """Names and compiled kernels of what ``call`` would launch."""
    torch.backends.cudnn.allow_tf32 = dtype == 'tf32'
    kernels = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        again = kwargs.get('CAREFUL', False)
        if careful or not again:
            name = self.__name__.removesuffix('_kernel') + (', careful' if again else '')
            name += ', transposed' if kwargs.get('TRANSPOSED') else ''
            kernels.append((name, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget('cuda', capability, 32),
            get_current_device=lambda: capability,  # which has kernels of its own
            get_current_stream=lambda device: 0,
        )
    )
    run, JITFunction.run = JITFunction.run, compile_only
    try:
        call(DTYPES[dtype])
    finally:
        JITFunction.run = run
    return kernels


def attention(
    dim: int,
    gradients: Collection[str] = INPUTS,
    kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
    mixed: bool = False,
) -> Callable[[torch.dtype], None]:
    """Forward and backward pass of attention, or mixed attention, heads as a layer has them."""

    def call(dtype: torch.dtype) -> None:
        maps = torch.zeros(1, 20, 20, 2, dim, dtype=dtype).permute(0, 3, 4, 1, 2)
        query = maps[..., ::stride, ::stride]
        geometry = (kernel_size, stride, dilation, dim**-0.5)
        slopes, factor = (torch.zeros(dim, 2), torch.ones(1)) if mixed else (None, None)
        inputs = (query, maps, maps, slopes)
        convolution = torch.zeros_like(query) if mixed else None
        output, alone, lse = triton_backend._forward(*inputs, convolution, factor, *geometry, True)
        kept = alone if mixed else output
        needed = [name in gradients for name in INPUTS] + [False, False]
        triton_backend._backward(output, *inputs, factor, kept, lse, *geometry, needed)

    return call


def group_conv(layout: torch.memory_format, stride: int, dilation: int) -> Callable:
    """Forward and backward pass of a layer ACmix of 64 channels."""

    def call(dtype: torch.dtype) -> None:
        maps = torch.zeros(1, 192, 20, 20, dtype=dtype).to(memory_format=layout)
        weight = torch.zeros(64, 12, 3, 3, dtype=dtype)
        geometry = (stride, dilation, 16)
        output = triton_group_conv.group_conv(maps, weight, weight[:, 0, 0, 0], *geometry)
        triton_group_conv._grad_input(output, weight, 20, 20, *geometry)
        triton_group_conv._grad_weight(output, maps, 3, *geometry)

    return call


def local_aggregation(layout: torch.memory_format, *geometry: int) -> Callable:
    """Forward and backward pass of SAN's first layer of 64 channels of values."""

    def call(dtype: torch.dtype) -> None:
        value = torch.zeros(1, 64, 20, 20, dtype=dtype).to(memory_format=layout)
        size = value[..., :: geometry[1], :: geometry[1]].shape[2:]
        weight = torch.zeros(1, 8 * geometry[0] ** 2, *size, dtype=dtype)
        weight = weight.to(memory_format=layout).unflatten(1, (8, -1))
        output = triton_local_aggregation._forward(value, weight, *geometry, False)
        triton_local_aggregation._grad_value(output, weight, 20, 20, *geometry, False)
        triton_local_aggregation._grad_weight(output, value, 8, *geometry, False)

    return call


def patch_weights(layout: torch.memory_format, *geometry: int) -> Callable:
    """Forward and backward pass of SAN's stage of 512 channels."""

    def call(dtype: torch.dtype) -> None:
        kernel_size, stride, dilation = geometry
        channels, size = 32, 20 + (kernel_size - 1) * dilation
        padded = torch.zeros(1, channels, size, size, dtype=dtype).to(memory_format=layout)
        query = padded[..., :20:stride, :20:stride].contiguous(memory_format=layout)
        vector = torch.zeros(channels * (1 + kernel_size**2))
        weight = vector[:, None].expand(-1, 16).contiguous()
        tensors = (query, padded, vector, vector, vector, weight)
        output = triton_patch_weights.patch_weights(*tensors, *geometry)
        triton_patch_weights._backward(output, *tensors, *geometry)

    return call


OPERATORS = ('local_attention', 'group_conv', 'local_aggregation', 'patch_weights')


def calls(args: argparse.Namespace) -> list[tuple[str | int, Callable[[torch.dtype], None]]]:
    """Head dimensions or layouts, and what launches their kernels."""
    steps = (args.stride, args.dilation)
    found = []
    if 'local_attention' in args.operators:
        geometry = (args.kernel_size, *steps)
        found += [(d, attention(d, args.gradients, *geometry, args.mixed)) for d in args.dim]
    for name, layout in LAYOUTS.items():
        if 'group_conv' in args.operators:
            found.append((f'group_conv, {name}', group_conv(layout, *steps)))
        if 'local_aggregation' in args.operators:
            call = local_aggregation(layout, args.kernel_size, *steps)
            found.append((f'local_aggregation, {name}', call))
        if 'patch_weights' in args.operators:
            found.append(
                (f'patch_weights, {name}', patch_weights(layout, args.kernel_size, *steps))
            )
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--capability', type=int, nargs='+', default=[80, 90], help='default: %(default)s'
    )
    parser.add_argument(
        '--operators', nargs='+', choices=OPERATORS, default=OPERATORS[:1], metavar='NAME',
        help=f'of {", ".join(OPERATORS)}; default: the first',
    )  # fmt: skip
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        '--dim', type=int, nargs='+', default=[16, 32, 64, 128],
        help='head dimensions of attention; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--gradients',
        nargs='+',
        choices=INPUTS,
        default=INPUTS,
        help='those computed of attention; default: all',
    )
    parser.add_argument('--kernel-size', type=int, default=7, help='default: %(default)s')
    parser.add_argument('--stride', type=int, default=1, help='default: %(default)s')
    parser.add_argument('--dilation', type=int, default=1, help='default: %(default)s')
    parser.add_argument(
        '--mixed',
        action='store_true',
        help='attention of the operator of both paths: position encoding and sum of paths inside',
    )
    parser.add_argument(
        '--careful', action='store_true', help='also the programs for numbers that are not finite'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.use_deterministic_algorithms(True)  # no tuning
    print(f'| {" | ".join(COLUMNS)} |\n|{"---|" * len(COLUMNS)}')
    for capability in args.capability:
        for dtype in args.dtype:
            for form, call in calls(args):
                for name, kernel in compiled(capability, dtype, call, args.careful):
                    row = [name, capability, dtype, form, *properties(kernel).values()]
                    print(f'| {" | ".join(map(str, row))} |', flush=True)


if __name__ == '__main__':
    main()
