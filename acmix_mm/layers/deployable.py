"""The form for inference: what operators that have one share."""

import torch
from torch import nn


class WrongForm(ValueError):
    """A state dict of the form for inference where it is that for training, or the reverse."""


class Deployable(nn.Module):
    """An operator that folds its weights for inference, together with a batch norm after it.

    Subclasses implement :meth:`fold`. State dicts of the two forms are told apart by names that
    only one of them has, so that none is loaded into the other in silence.
    """

    # Names that parameters have in the form for inference only.
    deployed_names: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.deployed = False
        self._training_names: frozenset[str] = frozenset()
        self.register_load_state_dict_pre_hook(_check_form)

    def fold(self, norm: nn.Module | None) -> None:
        """Replace the parameters by those of the form for inference, without gradients."""
        raise NotImplementedError

    @torch.no_grad()
    def switch_to_deploy(self, norm: nn.Module | None = None) -> None:
        """Fold everything that can be, for inference, in place; a second call does nothing.

        Results stay within rounding. The state dict's names change, so load checkpoints before (or
        deployed ones after). :func:`acmix_mm.deploy` does this to a whole model.

        Args:
            norm (nn.Module | None): A batch norm that is applied to the output, to be folded; the
                caller takes it out of the model. Default: None.

        Raises:
            ValueError: If norm is no batch norm with running statistics, or the operator is
                deployed already or ends in a projection, so that norm cannot be folded.
        """
        if norm is not None and self.deployed:
            raise ValueError('norm must be None for an operator that is deployed already')
        if self.deployed:
            return
        names = set(self.state_dict())
        self.fold(norm)
        self._training_names = frozenset(names - set(self.state_dict()))
        self.requires_grad_(False)
        self.deployed = True


def _check_form(module: Deployable, state_dict: dict, prefix: str, *args) -> None:
    """Refuse a state dict of the other form, of which next to nothing would be loaded."""
    if module.deployed:
        foreign, form = module._training_names, 'for training'
        advice = (
            'load it into the model as it is trained, without deploy=True, then call '
            'acmix_mm.deploy(model)'
        )
    else:
        foreign, form = module.deployed_names, 'for inference'
        advice = (
            'load it into the deployed model: acmix_mm.deploy(model).load_state_dict(...), or '
            'build the backbone with deploy=True'
        )
    found = next((prefix + name for name in foreign if prefix + name in state_dict), None)
    if found is not None:
        raise WrongForm(f'state dict has the form {form}, with {found!r}: {advice}')
