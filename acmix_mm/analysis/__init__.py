"""What is computed about models: costs, time and memory, comparison runs.

Needs mmengine, and mmdet for its detectors; not imported by ``import acmix_mm``.
"""

from .costs import Cost, NetworkCosts, OperatorCosts, Stages, count_flops, network_costs

__all__ = ['Cost', 'NetworkCosts', 'OperatorCosts', 'Stages', 'count_flops', 'network_costs']
