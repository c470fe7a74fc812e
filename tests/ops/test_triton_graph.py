import json
import subprocess
import sys
from pathlib import Path

import pytest
from devices import needs_triton

pytestmark = needs_triton

# What kernels write. Of attention each is launched twice, the second time for what is not finite.
ATTENTION = ['attention', 'lse', 'output']
QUERY, KEY_VALUE = ['delta', 'grad_query', 'tilts'], ['grad_key', 'grad_value']
RESULT, SUMS = ['result'], ['sums']
KERNELS = {
    'fused_acmix': (
        [RESULT, ATTENTION, ATTENTION], [QUERY, QUERY, KEY_VALUE, KEY_VALUE, RESULT, SUMS]
    ),
    'local_aggregation': ([RESULT], [RESULT, RESULT]),
    # Backward, of the query and of the patch.
    'patch_weights': ([RESULT], [RESULT, SUMS, RESULT, SUMS]),
}  # fmt: skip


@pytest.fixture(scope='module')
def graphs():
    program = Path(__file__).with_name('triton_graph.py')
    result = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize('operator', KERNELS)
def test_compiled_graphs_hold_the_kernels(operator, graphs):
    """Not opaque operators, and one graph for maps of all sizes; what kernels write is known."""
    forward, backward = KERNELS[operator]
    assert graphs[operator] == {
        'forward': forward, 'backward': backward, 'opaque': [], 'recompiled': 0
    }  # fmt: skip
