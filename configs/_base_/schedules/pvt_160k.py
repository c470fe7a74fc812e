# This project's choice: as pvt_80k.py, for 160k iterations.
_base_ = './pvt_80k.py'
train_cfg = dict(max_iters=160_000)
param_scheduler = [*_base_.param_scheduler[:-1], dict(_base_.param_scheduler[-1], end=160_000)]
