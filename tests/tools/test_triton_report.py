import re
import subprocess
import sys
from pathlib import Path

import pytest
from devices import needs_triton

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'dev' / 'triton_report.py'
KERNELS = ['forward', 'grad_query', 'grad_key_value']

pytestmark = needs_triton


def report(*options: str) -> list[dict[str, str]]:
    """Rows of the table, by a process in which Triton is not interpreted."""
    command = [sys.executable, TOOL, *options]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    titles, rule, *rows = (
        [cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()
    )
    assert set(rule) == {'---'}
    return [dict(zip(titles, row, strict=True)) for row in rows]


@pytest.fixture(autouse=True)
def _compiles_anew(tmp_path, monkeypatch):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))


@pytest.mark.parametrize('options', [(), ('--mixed',)])
def test_half_precision_moves_16_bytes_at_once_and_spills_nothing(options):
    rows = report('--dtype', 'float16', '--dim', '64', *options)
    assert [(row['kernel'], row['capability']) for row in rows] == [
        (kernel, capability) for capability in ('80', '90') for kernel in KERNELS
    ]
    for row in rows:
        assert row['spilled bytes'] == '0'
        # Numbers of 4 bytes are log-sum-exps and the like, one a query, and parameters.
        for column in ('loads', 'stores'):
            widths = set(re.findall(r'x (\d+)', row[column]))
            assert {'16'} <= widths <= {'16', '4'}
        instruction = {'80': 'mma', '90': 'wgmma'}[row['capability']]
        assert re.fullmatch(rf'\d+ {instruction} f16', row['matrix instructions'])


def test_float32_takes_matrix_instructions_as_tf32_only():
    rows = report('--capability', '80', '--dtype', 'tf32', 'float32', '--dim', '16')
    for row in rows:
        assert bool(row['matrix instructions']) == (row['dtype'] == 'tf32')
        assert row['spilled bytes'] == '0'


@pytest.mark.parametrize(
    ('gradients', 'kernels', 'mixed'),
    [
        (['key'], ['forward', 'grad_key_value'], []),
        (['query', 'value'], KERNELS, ['--mixed']),
    ],
)
def test_every_variant_compiles(gradients, kernels, mixed):
    """Rows that do not start at multiples of 16 bytes, phases, and numbers that are not finite."""
    geometry = ('--dim', '23', '--kernel-size', '5', '--stride', '3', '--dilation', '2')
    options = ('--capability', '90', '--dtype', 'float16', '--careful', '--gradients', *gradients)
    rows = report(*geometry, *options, *mixed)
    assert [row['kernel'] for row in rows] == [
        name for kernel in kernels for name in (kernel, f'{kernel}, careful')
    ]
    assert not any('x 16' in row['loads'] for row in rows)


def test_other_operators_spill_nothing():
    """Channels of a group are read in 8 bytes where they are adjacent."""
    names = ('group_conv', 'local_aggregation', 'patch_weights')
    rows = report('--operators', *names, '--dtype', 'float16')
    assert len(rows) == 2 * 2 * (3 + 3 + 5)
    for row in rows:
        assert row['spilled bytes'] == '0'
        if row['d or operator'] == 'group_conv, channels last':
            assert ' x 8' in row['loads']
            assert row['matrix instructions']
