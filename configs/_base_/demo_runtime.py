# Runtime for small experiments: log often, keep the last two checkpoints, and repeat.
_base_ = './default_runtime.py'

default_hooks = dict(logger=dict(interval=20), checkpoint=dict(max_keep_ckpts=2, save_best=None))
log_processor = dict(window_size=20)
randomness = dict(seed=0)
