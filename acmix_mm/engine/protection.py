"""The hooks of this package for any config."""

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, LoggerHook

# Before PreemptionHook, which leaves: what the summary says of time is in its checkpoint.
HOOKS = ('ReproducibilityHook', 'StopAtNonFiniteLossHook', 'SummaryHook', 'PreemptionHook')
# By their keys in default_hooks: mmengine's, what takes its place, and the Runner's arguments.
REPLACED = {
    'checkpoint': (CheckpointHook, 'SafeCheckpointHook', {'interval': 1}),
    'logger': (LoggerHook, 'PacedLoggerHook', {}),
}


def protect(cfg: Config) -> None:
    """Put the hooks of this package into a config, in place.

    mmengine's ``CheckpointHook`` becomes ``SafeCheckpointHook``, and ``LoggerHook``
    ``PacedLoggerHook``, with the same arguments; one of another class stays, and so does its
    absence. A config that has the hooks keeps them.
    """
    defaults = {
        key: {'type': old.__name__, **arguments} for key, (old, _, arguments) in REPLACED.items()
    }
    cfg.default_hooks = {**defaults, **(cfg.get('default_hooks') or {})}
    for key, (old, new, _) in REPLACED.items():
        hook = cfg.default_hooks[key]
        if hook and hook.type in (old.__name__, f'mmengine.{old.__name__}', old):
            hook.type = new
    hooks = list(cfg.get('custom_hooks') or [])
    present = {hook.get('type') for hook in hooks if isinstance(hook, dict)}
    cfg.custom_hooks = hooks + [{'type': name} for name in HOOKS if name not in present]
    imports = cfg.get('custom_imports') or {'imports': []}
    names = imports['imports']
    names = [names] if isinstance(names, str) else list(names)
    if 'acmix_mm' not in names:
        cfg.custom_imports = {**imports, 'imports': [*names, 'acmix_mm']}
