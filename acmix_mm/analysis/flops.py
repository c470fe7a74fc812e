"""What models compute."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode


def count_flops(function: Callable[[], object]) -> int:
    """Multiplications of convolutions, matrix products, attention and aggregation.

    One with its addition is one FLOP, as papers on vision models count.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() // 2  # it counts additions too
