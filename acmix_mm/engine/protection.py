"""The hooks of this package for any config."""

from mmengine.config import Config
from mmengine.hooks import CheckpointHook

HOOKS = ('ReproducibilityHook', 'StopAtNonFiniteLossHook', 'PreemptionHook')


def protect(cfg: Config) -> None:
    """Put the hooks of this package into a config, in place.

    mmengine's ``CheckpointHook`` becomes ``SafeCheckpointHook`` with the same arguments; one of
    another class stays, and so does its absence. A config that has the hooks keeps them.
    """
    default = {'checkpoint': {'type': 'CheckpointHook', 'interval': 1}}  # the Runner's
    cfg.default_hooks = {**default, **(cfg.get('default_hooks') or {})}
    saving = cfg.default_hooks.checkpoint
    if saving and saving.type in ('CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook):
        saving.type = 'SafeCheckpointHook'
    hooks = list(cfg.get('custom_hooks') or [])
    present = {hook.get('type') for hook in hooks if isinstance(hook, dict)}
    cfg.custom_hooks = hooks + [{'type': name} for name in HOOKS if name not in present]
    imports = cfg.get('custom_imports') or {'imports': []}
    names = imports['imports']
    names = [names] if isinstance(names, str) else list(names)
    if 'acmix_mm' not in names:
        cfg.custom_imports = {**imports, 'imports': [*names, 'acmix_mm']}
