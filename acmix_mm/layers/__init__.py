"""Mixed operators as modules, registered as layer types."""

from .acmix import ACmix
from .mixed_operator import MixedOperator

__all__ = ['ACmix', 'MixedOperator']
