# As schedule_demo.py, for more epochs, evaluated after each.
_base_ = './schedule_demo.py'
train_cfg = dict(max_epochs=8, val_interval=1)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=8, T_max=8),
]
