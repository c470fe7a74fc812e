# Segmentors in small experiments, trained by epochs: log often, keep the last two checkpoints, and
# repeat.
_base_ = './segmentation_runtime.py'

default_hooks = dict(
    logger=dict(interval=20, log_metric_by_epoch=True),
    checkpoint=dict(by_epoch=True, interval=1, max_keep_ckpts=2, save_best=None),
)
log_processor = dict(window_size=20, by_epoch=True)
randomness = dict(seed=0)
