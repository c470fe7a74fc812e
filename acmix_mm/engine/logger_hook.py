"""Lines of the log that come soon, however long iterations and epochs are."""

from mmengine.hooks import LoggerHook
from mmengine.runner import Runner

MOST = 50  # iterations between two lines, as OpenMMLab's configs have it
LINES = 10  # an epoch, at least, where it is shorter


class PacedLoggerHook(LoggerHook):
    """mmengine's ``LoggerHook`` with an interval that suits the data, and lines at the beginning.

    The first lines, each with an estimate of how long training takes, come after 1, 2, 4, 8, ...
    iterations, until the interval is reached; so it is after resumption.

    Args:
        interval (int | None): Iterations between two lines. Default: None, a tenth of an epoch, at
            most 50.
        **kwargs: Of ``LoggerHook``.
    """

    def __init__(self, interval: int | None = None, **kwargs):
        super().__init__(interval=MOST if interval is None else interval, **kwargs)
        self.chosen = interval is not None
        self.first = 0
        self.early = False

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.first = runner.iter
        if not self.chosen:
            self.interval = min(MOST, max(1, len(runner.train_dataloader) // LINES))

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        count = runner.iter - self.first + 1
        self.early = count < self.interval and count & (count - 1) == 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        super().after_train_iter(runner, batch_idx, data_batch, outputs)
        self.early = False

    def every_n_inner_iters(self, batch_idx: int, n: int) -> bool:
        """Whether there is to be a line."""
        return self.early or super().every_n_inner_iters(batch_idx, n)
