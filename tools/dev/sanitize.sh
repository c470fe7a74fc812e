#!/bin/sh
# Run the tests of the native CPU kernels, fuzzing and hostile calls among them, under
# AddressSanitizer and UndefinedBehaviorSanitizer.
#
# Usage: tools/dev/sanitize.sh [pytest arguments]     (after `make setup`; needs GCC; Linux)
#
# The extension is built anew, with -fsanitize=address,undefined, into a temporary directory beside
# a copy of the package, and the native tests run against that copy, once for each instruction set
# that the processor has. PyTorch allocates each CPU tensor and each scratch memory on its own by
# posix_memalign, which AddressSanitizer replaces: reads and writes past either end are found, those
# between pieces of one scratch memory are not.
#
# EXAMPLES=n sets how many examples hypothesis tries for each test; default 25.
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export CC="${CC:-gcc}" CXX="${CXX:-g++}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM

(cd "$root" && tar -cf - --exclude='*.so' --exclude=__pycache__ \
    setup.py pyproject.toml README.md acmix_mm docs/requirements.txt tests tools) | tar -xf - -C "$work"
cd "$work"
# -O1: at the usual -O3, compiling takes many times longer.
sed -i.bak "s/'-O3'/'-O1'/; s/'-g0'/'-g'/" setup.py
CFLAGS='-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined' \
LDFLAGS='-fsanitize=address,undefined' \
    "$python" setup.py --quiet build_ext --inplace
ls acmix_mm/ops/_native*.so > /dev/null  # a failed build only warns

cat > sanitized.py <<'PYTHON'
"""Few hypothesis examples: everything is slower under a sanitizer."""
import os

from hypothesis import settings

_init = settings.__init__


def _few(self, *args, **kwargs):
    kwargs['max_examples'] = int(os.environ.get('EXAMPLES', 25))
    kwargs['database'] = None
    _init(self, *args, **kwargs)


settings.__init__ = _few
PYTHON

# A library that is loaded into plain Python needs the sanitizer's, and libstdc++ for its
# interception of exceptions, in the process from the start. pytest must leave the file descriptors
# alone, or the report is lost with the process.
for capability in default avx2 avx512; do
    echo "ATEN_CPU_CAPABILITY=$capability"
    env -u PYTHONHOME PYTHONPATH="$work" ATEN_CPU_CAPABILITY=$capability \
        LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so) $($CXX -print-file-name=libstdc++.so.6)" \
        ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
        "$python" -m pytest -q --capture=sys -p sanitized -p no:cacheprovider \
        -k 'native or group_conv or hostile or beyond or ACmix or PatchAttention' \
        tests/ops/test_local_attention.py tests/ops/test_group_conv.py \
        tests/ops/test_fused_acmix.py tests/ops/test_local_aggregation.py \
        tests/ops/test_patch_weights.py tests/ops/test_fuzzing.py tests/ops/test_derivatives.py \
        tests/layers/test_fuzzing.py "$@"
done
