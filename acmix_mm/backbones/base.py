"""What backbones share: modes, and the start from a checkpoint."""

from mmdet.models.backbones import SwinTransformer
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..checkpoints import state_dict_of
from ..layers import MixedOperator
from ..weights import checkpoint_of, names_loaded

PREPARED = 'weights of '  # mmengine logs it with the file's name
_prepared: dict[str, dict[str, Tensor]] = {}


@CheckpointLoader.register_scheme(PREPARED)
def load_from_prepared(filename: str, map_location: str | None) -> dict[str, Tensor]:
    """What :class:`Backbone` gives to the ``init_weights`` of mmdet's class, by its file's name."""
    return {'state_dict': _prepared[filename]}


class Backbone:
    """Before the class of mmdet or mmengine that a backbone inherits from."""

    def train(self, mode: bool = True) -> nn.Module:
        """As PyTorch has it, also ``eval()``: returns the module, which mmdet's do not."""
        super().train(mode)
        return self

    def init_weights(self) -> None:
        """Initialise as the class does from which this one inherits.

        A checkpoint that ``init_cfg`` names holds its weights as they are, under ``state_dict`` or
        under ``model``, with or without the ``module.`` of parallel wrappers. Those after
        ``prefix`` are taken, a key of ``init_cfg`` that by default is ``backbone.`` if there are
        any. What is missing keeps its initial values, and is logged.

        Raises:
            ValueError: If the checkpoint has none of this network's weights, or some that do not
                fit.
        """
        init_cfg = checkpoint_of(self.init_cfg)
        # A second call does nothing in mmengine's class.
        if init_cfg is None or getattr(self, 'is_init', False):
            super().init_weights()
            return
        file = init_cfg['checkpoint']
        weights = self._read(file, init_cfg.get('prefix'))
        loaded = self._init_from(file, weights) if weights else set()
        own = self.state_dict()
        if not loaded:
            raise ValueError(
                f'init_cfg must name a checkpoint of this network, but {file} has none of the '
                f'weights of {type(self).__name__}, such as {next(iter(own))}'
            )
        new = [name for name in own if name not in loaded and 'num_batches_tracked' not in name]
        if new:
            MMLogger.get_current_instance().info(
                f'{len(new)} of {len(own)} names are not in {file} and keep their initial values: '
                f'{", ".join(new)}'
            )

    def _read(self, file: str, prefix: str | None) -> dict[str, Tensor]:
        """The checkpoint's weights that are this network's, by its names or the release's."""
        weights = state_dict_of(CheckpointLoader.load_checkpoint(file, map_location='cpu'))
        if prefix is None and any(name.startswith('backbone.') for name in weights):
            prefix = 'backbone.'
        if prefix:
            weights = {
                name.removeprefix(prefix): weight
                for name, weight in weights.items()
                if name.startswith(prefix)
            }
        return weights

    def _init_from(self, file: str, weights: dict[str, Tensor]) -> set[str]:
        """Have the inherited class initialise from these weights; which of its own it loaded."""
        init_cfg, key = self.init_cfg, PREPARED + file
        if isinstance(self, SwinTransformer) and not self.convert_weights:
            weights = {f'backbone.{name}': weight for name, weight in weights.items()}
        _prepared[key] = weights
        self.init_cfg = _renamed(init_cfg, key)
        try:
            with names_loaded(self) as loaded:
                super().init_weights()
        except (RuntimeError, LookupError) as error:
            raise ValueError(
                f'init_cfg must name a checkpoint of this network, but {file} does not fit '
                f'{type(self).__name__} ({type(error).__name__}: {" ".join(str(error).split())})'
            ) from error
        finally:
            self.init_cfg = init_cfg
            del _prepared[key]
        return loaded


def _renamed(init_cfg: dict | list[dict], file: str) -> ConfigDict | list[ConfigDict]:
    """An ``init_cfg`` with another checkpoint and no prefix."""
    if not isinstance(init_cfg, dict):
        return [_renamed(part, file) for part in init_cfg]
    if not init_cfg.get('checkpoint'):
        return init_cfg
    return ConfigDict(init_cfg, checkpoint=file, prefix=None)


class WarmStart(Backbone):
    """A backbone of mixed operators that may start as the plain network.

    Subclasses have ``warm_start`` as an argument, for which they call :func:`check_warm_start`.
    """

    warm_start: bool

    def init_weights(self) -> None:
        """Initialise as the plain network's class does; with ``warm_start``, as it in effect.

        Then ``init_cfg`` names a checkpoint of the plain network. Its weights are loaded, the
        convolution path's rate is 0 and the attention path's 1, so that outputs are the plain
        network's until training raises the rates. For what checkpoints may hold, see
        :meth:`Backbone.init_weights`.

        Raises:
            ValueError: If the checkpoint has none of this network's weights, or some that do not
                fit; with ``warm_start``, also if ``init_cfg`` names none, or one of a mixed
                network.
        """
        if self.warm_start and checkpoint_of(self.init_cfg) is None:
            raise ValueError(
                "warm_start must be False without init_cfg=dict(type='Pretrained', "
                f'checkpoint=...), got init_cfg={self.init_cfg}'
            )
        super().init_weights()
        if self.warm_start:
            for module in self.modules():
                if isinstance(module, MixedOperator):
                    nn.init.ones_(module.rate1)
                    nn.init.zeros_(module.rate2)

    def _read(self, file: str, prefix: str | None) -> dict[str, Tensor]:
        weights = super()._read(file, prefix)
        rates = sorted(name for name in weights if name.endswith(('.rate1', '.rate2')))
        if self.warm_start and rates:
            raise ValueError(
                f'warm_start must be False for the checkpoint of a mixed network, such as {file}, '
                f'which has {rates[0]}'
            )
        return weights


def check_warm_start(warm_start: bool, mix: str, deploy: bool) -> None:
    if warm_start and (mix != 'learned' or deploy):
        raise ValueError(
            f"warm_start must be False unless mix is 'learned' and deploy is False, got "
            f'warm_start={warm_start}, mix={mix!r}, deploy={deploy}'
        )
