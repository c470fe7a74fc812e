"""What the vision transformers with mixed operators share beyond mmdet's classes."""

from mmengine.logging import MMLogger
from torch import Tensor, nn

from ..layers import MixedOperator
from ..models import deploy
from .base import TrainReturnsModule


class MixedTransformer(TrainReturnsModule):
    """Start from a plain network's weights, and the form for inference; before mmdet's class.

    Args:
        *args: Of mmdet's class.
        mix (str): How the paths are combined, see :class:`~acmix_mm.layers.MixedOperator`.
        conv_kernel_size (int): Side of the convolution path's kernel, odd.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`.
        warm_start (bool): See :meth:`init_weights`.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves.
        **kwargs: Of mmdet's class.
    """

    def __init__(
        self,
        *args,
        mix: str,
        conv_kernel_size: int,
        backend: str | None,
        warm_start: bool,
        deploy: bool,
        **kwargs,
    ):
        if warm_start and (mix != 'learned' or deploy):
            raise ValueError(
                f"warm_start must be False unless mix is 'learned' and deploy is False, got "
                f'warm_start={warm_start}, mix={mix!r}, deploy={deploy}'
            )
        super().__init__(*args, **kwargs)
        self.warm_start = warm_start
        self.insert_operators({'kernel_size': conv_kernel_size, 'mix': mix, 'backend': backend})
        if deploy:
            self.switch_to_deploy()

    def insert_operators(self, acmix: dict) -> None:
        """Replace the plain operators by mixed ones, built with keyword arguments ``acmix``."""
        raise NotImplementedError

    def init_weights(self) -> None:
        """Initialise as mmdet's class does; with ``warm_start``, as the plain network in effect.

        Then ``init_cfg`` names a checkpoint of the plain network. Its weights are loaded, the
        convolution path's rate is 0 and the attention path's 1, so that outputs are the plain
        network's until training raises the rates; names that the checkpoint does not have are
        logged.

        Raises:
            ValueError: If ``warm_start`` is set without a checkpoint in ``init_cfg``, or for one
                of a mixed network, or one that has nothing of this network.
        """
        if not self.warm_start:
            super().init_weights()
            return
        if not self.init_cfg or 'checkpoint' not in self.init_cfg:
            raise ValueError(
                "warm_start must be False without init_cfg=dict(type='Pretrained', "
                f'checkpoint=...), got init_cfg={self.init_cfg}'
            )
        loaded = set()

        def inspect(module: nn.Module, state_dict: dict[str, Tensor], *args) -> None:
            loaded.update(state_dict)
            rates = sorted(name for name in loaded if name.endswith(('.rate1', '.rate2')))
            if rates:
                raise ValueError(
                    f'warm_start must be False for the checkpoint of a mixed network, such as '
                    f'{self.init_cfg["checkpoint"]}, which has {rates[0]}'
                )

        hook = self.register_load_state_dict_pre_hook(inspect)
        try:
            super().init_weights()
        finally:
            hook.remove()
        new = [name for name in self.state_dict() if name not in loaded]
        if len(new) == len(self.state_dict()):
            raise ValueError(
                f'warm_start needs a checkpoint of the plain network, but '
                f'{self.init_cfg["checkpoint"]} has none of its weights'
            )
        for module in self.modules():
            if isinstance(module, MixedOperator):
                nn.init.ones_(module.rate1)
                nn.init.zeros_(module.rate2)
        MMLogger.get_current_instance().info(
            f'warm_start: {len(new)} names are not in {self.init_cfg["checkpoint"]} and keep their '
            f'initial values (rate1 1, rate2 0): {", ".join(new)}'
        )

    def switch_to_deploy(self) -> None:
        """Fold what can be folded for inference, in place; a second call does nothing.

        See :func:`acmix_mm.deploy`.
        """
        deploy(self)
