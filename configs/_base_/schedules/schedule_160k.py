# MMSegmentation's 160k iterations, otherwise as schedule_80k.py.
_base_ = './schedule_80k.py'
train_cfg = dict(max_iters=160_000)
param_scheduler = [*_base_.param_scheduler[:-1], dict(_base_.param_scheduler[-1], end=160_000)]
