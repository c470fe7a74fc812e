"""What the vision transformers with mixed operators share beyond mmdet's classes."""

from ..models import deploy
from .base import WarmStart, check_warm_start


class MixedTransformer(WarmStart):
    """Mixed operators, and the form for inference; before mmdet's class.

    Args:
        *args: Of mmdet's class.
        mix (str): How the paths are combined, see :class:`~acmix_mm.layers.MixedOperator`.
        shift (str): How the convolution path shifts maps, see the same.
        kernel_groups (int | None): Kernels for the outputs of a head position, see the same.
        conv_kernel_size (int): Side of the convolution path's kernel, odd.
        backend (str | None): Of :func:`acmix_mm.ops.group_conv`.
        warm_start (bool): See :meth:`WarmStart.init_weights`.
        deploy (bool): Build the form that :meth:`switch_to_deploy` leaves.
        **kwargs: Of mmdet's class.
    """

    def __init__(
        self,
        *args,
        mix: str,
        shift: str,
        kernel_groups: int | None,
        conv_kernel_size: int,
        backend: str | None,
        warm_start: bool,
        deploy: bool,
        **kwargs,
    ):
        check_warm_start(warm_start, mix, deploy)
        super().__init__(*args, **kwargs)
        self.warm_start = warm_start
        self.insert_operators(
            {
                'kernel_size': conv_kernel_size,
                'mix': mix,
                'shift': shift,
                'kernel_groups': kernel_groups,
                'backend': backend,
            }
        )
        if deploy:
            self.switch_to_deploy()

    def insert_operators(self, acmix: dict) -> None:
        """Replace the plain operators by mixed ones, built with keyword arguments ``acmix``."""
        raise NotImplementedError

    def switch_to_deploy(self) -> None:
        """Fold what can be folded for inference, in place; a second call does nothing.

        See :func:`acmix_mm.deploy`.
        """
        deploy(self)
