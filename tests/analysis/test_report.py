"""Tables of known results."""

from acmix_mm.analysis.report import Peaks, floor_fraction, report, report_fps, report_scaling


def row(candidate: str, times: list[float], peak: int | None, **more) -> dict:
    case = {'shape': [1, 2], 'mode': 'train', 'dtype': 'float32'}
    return {'candidate': candidate, **case, 'times': times, 'peak': peak, **more}


def test_table_of_known_results():
    rows = [
        row('a', [0.1, 0.2, 0.4], 2**20, flops=1e11, bytes=1e9, weights=2**21),
        row('b', [0.5], 3 * 2**20),
        row('c', [], None, error='no'),
        row('d', [0.1], None, mode='forward'),
        row('e', [], None, mode='forward', unavailable='not installed'),
    ]
    peaks = Peaks({'float32': 1.0}, 50.0)
    table = [' '.join(line.split()) for line in report(rows, peaks)]
    assert table[3:6] == [
        'a 200.00 ms 150.00 - 300.00 ms 1.00x 1.0 MiB 1.00x 2.0 MiB 50.0% arithmetic',
        'b 500.00 ms 500.00 - 500.00 ms 2.50x 3.0 MiB 3.00x',
        'c failed',
    ]
    assert table[-2:] == ['d 100.00 ms 100.00 - 100.00 ms 1.00x', 'e not installed']


def test_floors_of_known_work():
    """Attention is bound by arithmetic outside matrix units, but for a device that has more."""
    work = {'flops': 1e12, 'attention_flops': 1e11, 'bytes': 1e9}
    attention = row('a', [2.0], None, **work)
    for peaks, floor in (
        (Peaks({'float32': 1.0}, 500.0, 0.2), '50.0% arithmetic'),
        (Peaks({'float32': 10.0}, 500.0, 0.1), '50.0% float32 arithmetic'),
        (Peaks({'float32': 10.0}, 2.0, 1.0), '25.0% bandwidth'),
        (Peaks({'float16': 10.0}), ''),
    ):
        assert floor_fraction(attention, peaks) == floor


def test_table_of_known_scaling():
    """Four times the pixels for nine times the time: three times for every doubling."""
    rows = [
        row('a', [0.1], 2**20, series='image', image=[1, 10, 10], pixels=100),
        row('a', [0.9], 2**22, series='image', image=[1, 20, 20], pixels=400),
        row('a', [], None, series='image', image=[1, 40, 40], pixels=1600, error='no'),
    ]
    table = [' '.join(line.split()) for line in report_scaling(rows)]
    assert table[3:] == [
        '1x10x10 100.00 ms 1000000.0 ns 1.0 MiB 10486 B',
        '1x20x20 900.00 ms 2250000.0 ns 3.00x 4.0 MiB 10486 B 2.00x',
        '1x40x40, train failed',
    ]


def test_table_of_known_frames_a_second():
    """Quartiles change places; ratios are of speed."""
    case = {'mode': 'forward', 'shape': [4, 6]}
    rows = [
        row('a', [0.25, 0.5, 0.5], None, **case, parameters=2_500_000, flops=51_390_000_000),
        row('b', [0.125], None, **case, parameters=12_345),
        row('c', [], None, **case, error='no'),
    ]
    table = [' '.join(line.split()) for line in report_fps(rows)]
    assert table[1:] == [
        '',
        '4x6, float32',
        'a 2.00 2.00 - 2.67 1.00x 2.50 M 51.39 G',
        'b 8.00 8.00 - 8.00 4.00x 12,345',
        'c failed',
    ]
