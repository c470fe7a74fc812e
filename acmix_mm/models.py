"""What is done to a whole model: its form for inference, its backend."""

from torch import nn

from .layers.deployable import Deployable
from .ops._batch_norm import is_batch_norm
from .ops._dispatch import check_backend


def deploy(model: nn.Module) -> nn.Module:
    """Fold all operators of a model for inference, in place; a second call does nothing.

    Rates, ``fc`` and biases go into the operators' remaining weights, and so do the batch norms
    that follow them, where the block around an operator says which that is. Results in evaluation
    mode stay within rounding; the names of the state dict change, so load checkpoints before (or
    deployed ones after).

    A block says so with an attribute ``operator_norms``, a dict from the operator's name to the
    name of the norm that is applied to its output. A module with a method ``fuse_convolutions``
    gets the call afterwards, for what it can fold beside the operators. A norm without running
    statistics stays.

    Args:
        model (nn.Module): Any model with layers of this package, or one of these layers.

    Returns:
        nn.Module: The model.
    """
    modules = list(model.modules())
    for block in modules:
        for operator_name, norm_name in getattr(block, 'operator_norms', {}).items():
            operator, norm = getattr(block, operator_name), getattr(block, norm_name)
            # Without running statistics it takes those of the batch, in evaluation mode, too.
            foldable = getattr(norm, 'running_var', None) is not None and is_batch_norm(norm)
            if isinstance(operator, Deployable) and foldable and not operator.deployed:
                operator.switch_to_deploy(norm)
                setattr(block, norm_name, nn.Identity())
    for module in modules:
        if isinstance(module, Deployable):
            module.switch_to_deploy()
    for module in modules:
        if hasattr(module, 'fuse_convolutions'):
            module.fuse_convolutions()
    return model


def set_backend(model: nn.Module, backend: str | None) -> nn.Module:
    """Have all layers of a model that take a backend work by this one.

    Args:
        model (nn.Module): Any model with layers of this package, or one of these layers.
        backend (str | None): See :func:`acmix_mm.ops.local_attention`.

    Returns:
        nn.Module: The model.

    Raises:
        ValueError: If ``backend`` is no backend's name.
    """
    check_backend(backend)
    for module in model.modules():
        # Modules of others may have an attribute of that name, too; subclasses of ours are ours.
        ours = any(kind.__module__.startswith('acmix_mm.') for kind in type(module).__mro__)
        if ours and hasattr(module, 'backend'):
            module.backend = backend
    return model
