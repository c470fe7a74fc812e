"""The length of training, with all of a config that depends on it."""

import math

from mmengine.config import Config

from .config_check import setting

NEVER = 10**9  # mmengine's end of a scheduler that has none
# What names a moment or a duration, in epochs or iterations, and is scaled with the length.
SCHEDULER_KEYS = ('begin', 'end', 'T_max', 'total_steps', 'step_size', 'milestones', 'periods')
LOOP_KEYS = ('val_begin', 'val_interval')
CHECKPOINT_KEYS = ('interval', 'save_begin')
HOOK_KEYS = ('switch_epoch', 'num_last_epochs', 'begin_epoch', 'begin_iter')
AT_LEAST_1 = ('val_interval', 'interval', 'step_size', 'num_last_epochs')


def set_length(
    cfg: Config, length: int, unit: str, file: str, argument: str, warmup: bool = True
) -> None:
    """Train for so many epochs or iterations; the whole schedule shrinks or grows in proportion.

    That is where schedulers begin, end and step, warm-ups included, the intervals of validation and
    of checkpoints, which stay at least 1, and the epoch from which hooks such as mmdet's
    ``PipelineSwitchHook`` have the last ones trained in another way.

    Args:
        cfg (Config): Changed in place.
        length (int): How long to train.
        unit (str): 'epochs', or 'iters' for a config that counts iterations.
        file (str): The config's name, for messages.
        argument (str): Where the length comes from, for messages.
        warmup (bool): Whether schedulers that count iterations in a config that counts epochs
            change, too, and the intervals. Default: True.

    Raises:
        ValueError: If the length is not positive, if the config counts in the other unit, or if
            nothing is left of a part of the schedule.
    """
    loop = cfg.train_cfg
    if length < 1:
        raise ValueError(f'{argument} must be at least 1, got {length}')
    if f'max_{unit}' not in loop:
        other, key = {'epochs': ('iterations', 'iters'), 'iters': ('epochs', 'epochs')}[unit]
        raise ValueError(f'{argument}: {file} counts {other} (train_cfg.max_{key})')
    whole = loop[f'max_{unit}']

    def scaled(value: float) -> int:
        return math.ceil(value * length / whole - 0.5)  # halves down: a last epoch stays one

    def scale(node: dict, keys: tuple[str, ...]) -> None:
        for key in keys:
            value, least = node.get(key), int(key in AT_LEAST_1)
            if isinstance(value, (list, tuple)):
                node[key] = [scaled(item) for item in value]
            elif value is not None and 0 < value < NEVER:
                node[key] = max(least, scaled(value))

    schedulers = cfg.get('param_scheduler') or []
    schedulers = [schedulers] if isinstance(schedulers, dict) else schedulers
    kept = []
    for scheduler in schedulers:
        counts_other = unit == 'epochs' and not scheduler.get('by_epoch', True)
        if not counts_other or warmup:
            scale(scheduler, SCHEDULER_KEYS)
        span = scheduler.get('end', NEVER) - scheduler.get('begin', 0)
        if span <= 0 and not counts_other and scheduler.type != 'LinearLR':
            raise ValueError(
                f'{argument} {length}: nothing is left of {scheduler.type} in {file}, whose '
                f'schedule is for {whole} {unit}'
            )
        if span > 1 or scheduler.type != 'LinearLR':  # a warm-up of one iteration is none
            kept.append(scheduler)
    if schedulers:
        cfg.param_scheduler = kept
    loop[f'max_{unit}'] = length
    if not warmup:
        return
    scale(loop, LOOP_KEYS)
    if 'dynamic_intervals' in loop:  # from when on, and the interval
        loop.dynamic_intervals = [
            (scaled(begin), max(1, scaled(interval))) for begin, interval in loop.dynamic_intervals
        ]
    scale(setting(cfg, 'default_hooks.checkpoint') or {}, CHECKPOINT_KEYS)
    for hook in cfg.get('custom_hooks') or []:
        scale(hook, HOOK_KEYS)
