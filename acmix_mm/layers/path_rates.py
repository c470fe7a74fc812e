"""Rates of the two paths of mixed operators: which of them a trained model prefers."""

import math
from dataclasses import dataclass

from torch import nn

from .mixed_operator import MixedOperator


@dataclass(frozen=True)
class PathRates:
    """Factors with which a mixed operator adds its paths up.

    ``rate1 * attention + rate2 * convolution`` (ACmix, CVPR 2022, section 4.2), where the paper
    writes alpha for ``rate1`` and beta for ``rate2``.

    Args:
        name (str): Of the operator in its model.
        rate1 (float): Of the attention path; 0 if there is none.
        rate2 (float): Of the convolution path; 0 if there is none.
        learned (bool): Whether training changes them, as for ``mix`` 'learned' and 'complementary'.
    """

    name: str
    rate1: float
    rate2: float
    learned: bool = True

    @property
    def ratio(self) -> float:
        """|rate1 / rate2|: above 1 attention has more weight; infinite or NaN for rate2 = 0."""
        if self.rate2:
            return abs(self.rate1 / self.rate2)
        return math.inf if self.rate1 else math.nan

    @property
    def log_ratio(self) -> float:
        """Natural logarithm of :attr:`ratio`, as the paper's figure 5 has it."""
        return math.log(self.ratio) if self.ratio else -math.inf


def mixed_operators(model: nn.Module) -> dict[str, MixedOperator]:
    """All mixed operators of a model by their names, in the order in which the model has them.

    That is the order of depth in the backbones of this package.

    Raises:
        ValueError: If there is none.
    """
    operators = {n: m for n, m in model.named_modules() if isinstance(m, MixedOperator)}
    if not operators:
        raise ValueError(
            f'model must have operators that mix attention and convolution, {type(model).__name__} '
            'has none'
        )
    return operators


def path_rates(model: nn.Module) -> list[PathRates]:
    """Rates of all mixed operators of a model, in the order of :func:`mixed_operators`.

    Args:
        model (nn.Module): Any model with layers of this package, or one of these layers.

    Returns:
        list[PathRates]: For ``mix='complementary'`` with rate2 = 1 - rate1. Of the modes without
        parameters, 'sum' has rates of 1, 'attention' and 'conv' have 1 for their path and 0 for the
        other.

    Raises:
        ValueError: If there is no mixed operator, or if one is deployed, which leaves no rates.
    """
    return [_rates_of(name, operator) for name, operator in mixed_operators(model).items()]


def _rates_of(name: str, operator: MixedOperator) -> PathRates:
    check_not_deployed(name, operator)
    if operator.mix not in ('learned', 'complementary'):
        fixed = (float(operator.with_attention), float(operator.with_convolution))
        return PathRates(name, *fixed, learned=False)
    rate1 = operator.rate1.item()
    rate2 = operator.rate2.item() if operator.mix == 'learned' else 1 - rate1
    return PathRates(name, rate1, rate2)


def check_not_deployed(name: str, operator: MixedOperator) -> None:
    if operator.deployed:
        raise ValueError(
            f'model must be as it is trained: {name or type(operator).__name__} is deployed, its '
            'rates are folded into other weights'
        )
