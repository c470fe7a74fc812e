"""What is computed about models: costs by stage, time and memory, comparisons, bias, attention.

Costs and measurements of modules need PyTorch alone, the rest mmengine, and mmdet for its
detectors. Not imported by ``import acmix_mm``.
"""

from .costs import Cost, NetworkCosts, OperatorCosts, Stages, count_flops, network_costs

__all__ = ['Cost', 'NetworkCosts', 'OperatorCosts', 'Stages', 'count_flops', 'network_costs']
