"""What Triton's compiler makes of the kernels of neighbourhood attention, without a GPU.

Calls the operators as a GPU would have them called, up to where a compiled kernel would be
launched, and prints a Markdown table: for each kernel, compute capability, dtype and head dimension
the registers of a thread, the bytes that it spills, loads from and stores to global memory by their
width, matrix instructions and shared memory. These are counts of instructions in the program, not
of their executions, and no times.
"""

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

os.environ.pop('TRITON_INTERPRET', None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

torch.cuda.is_available = lambda: True  # asked by the backend when it is imported

from acmix_mm.ops.backends import triton_backend  # noqa: E402

INPUTS = ('query', 'key', 'value')
# 'float32' is without TF32.
DTYPES = {
    'float16': torch.float16,
    'bfloat16': torch.bfloat16,
    'float32': torch.float32,
    'tf32': torch.float32,
}
BIN = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
COLUMNS = (
    'kernel', 'capability', 'dtype', 'd', 'registers', 'spilled bytes', 'loads', 'stores',
    'matrix instructions', 'shared memory',
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
    capability: int,
    dtype: str,
    dim: int,
    careful: bool = False,
    gradients: Collection[str] = INPUTS,
    kernel_size: int = 7,
    stride: int = 1,
    dilation: int = 1,
    mixed: bool = False,
) -> list[tuple[str, object]]:
    """Names and compiled kernels of attention, forward and backward; or of mixed attention."""
    torch.backends.cudnn.allow_tf32 = dtype == 'tf32'
    kernels = []

    def compile_only(self, *args, grid, warmup, CAREFUL, **kwargs):
        if careful or not CAREFUL:
            name = self.__name__.removesuffix('_kernel') + (', careful' if CAREFUL else '')
            kernel = run(self, *args, grid=grid, warmup=True, CAREFUL=CAREFUL, **kwargs)
            kernels.append((name, kernel))

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget('cuda', capability, 32),
            get_current_device=lambda: capability,  # which has kernels of its own
            get_current_stream=lambda device: 0,
        )
    )
    run, JITFunction.run = JITFunction.run, compile_only
    try:
        # Heads side by side, as a layer has them.
        maps = torch.zeros(1, 20, 20, 2, dim, dtype=DTYPES[dtype]).permute(0, 3, 4, 1, 2)
        query = maps[..., ::stride, ::stride]
        geometry = (kernel_size, stride, dilation, dim**-0.5)
        slopes, factor = (torch.zeros(dim, 2), torch.ones(1)) if mixed else (None, None)
        inputs = (query, maps, maps, slopes)
        convolution = torch.zeros_like(query) if mixed else None
        output, attention, lse = triton_backend._forward(
            *inputs, convolution, factor, *geometry, True
        )
        kept = attention if mixed else output
        needed = [name in gradients for name in INPUTS] + [False, False]
        triton_backend._backward(output, *inputs, factor, kept, lse, *geometry, needed)
    finally:
        JITFunction.run = run
    return kernels


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--capability', type=int, nargs='+', default=[80, 90], help='default: %(default)s'
    )
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        '--dim', type=int, nargs='+', default=[16, 32, 64, 128],
        help='head dimensions; default: %(default)s',
    )  # fmt: skip
    parser.add_argument(
        '--gradients',
        nargs='+',
        choices=INPUTS,
        default=INPUTS,
        help='those computed; default: all',
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
            for dim in args.dim:
                geometry = (args.kernel_size, args.stride, args.dilation)
                for name, kernel in compiled(
                    capability, dtype, dim, args.careful, args.gradients, *geometry, args.mixed
                ):
                    row = [name, capability, dtype, dim, *properties(kernel).values()]
                    print(f'| {" | ".join(map(str, row))} |', flush=True)


if __name__ == '__main__':
    main()
