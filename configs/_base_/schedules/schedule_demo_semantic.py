# As schedule_demo_transformer.py, for more epochs.
_base_ = './schedule_demo_transformer.py'
train_cfg = dict(max_epochs=8, val_interval=8)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=8, T_max=8),
]
