"""How much weight mixed operators give to attention and to convolution, while they train."""

import math

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..layers.path_rates import PathRates, path_rates

PREFIX = 'path_bias'
QUANTITIES = ('rate1', 'rate2', 'ratio')


class PathBiasHook(Hook):
    """Write the rates of all mixed operators to the visualizer's backends (ACmix, figure 5).

    Scalars are ``path_bias_rate1/NAME``, ``|rate1|`` of the attention path,
    ``path_bias_rate2/NAME``, ``|rate2|`` of the convolution path, and ``path_bias_ratio/NAME``,
    ``|rate1 / rate2|``, for every operator with learned rates by its name in the model; the step is
    the iteration. So they are in ``vis_data/scalars.json``, and in TensorBoard or others where the
    visualizer has such a backend, but not in the console's log. What is not finite, such as the
    ratio at rate2 = 0, is left out.
    ``tools/analysis_tools/plot_path_bias.py`` draws them.

    Args:
        interval (int): Iterations between two records; there is one at the end of training, too.
            Default: 50.

    Raises:
        ValueError: If interval is not a positive integer.
    """

    def __init__(self, interval: int = 50):
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive integer, got {interval!r}')
        self.interval = interval
        self.recorded = -1

    def before_train(self, runner: Runner) -> None:
        """Say so where there is nothing to record.

        Raises:
            ValueError: If the model has no mixed operators, or deployed ones.
        """
        self.recorded = -1
        if not self._rates(runner):
            runner.logger.warning(
                'PathBiasHook records nothing: no mixed operator of the model has learned rates'
            )

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._record(runner, runner.iter + 1)

    def after_train(self, runner: Runner) -> None:
        if self.recorded != runner.iter:
            self._record(runner, runner.iter)

    @master_only
    def _record(self, runner: Runner, iteration: int) -> None:
        scalars = {
            f'{PREFIX}_{quantity}/{rates.name}': value
            for quantity in QUANTITIES
            for rates in self._rates(runner)
            for value in [abs(getattr(rates, quantity))]
            if math.isfinite(value)
        }
        if scalars:
            runner.visualizer.add_scalars(scalars, step=iteration)
        self.recorded = iteration

    @staticmethod
    def _rates(runner: Runner) -> list[PathRates]:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        return [rates for rates in path_rates(model) if rates.learned]
