# Swin's release for UperNet: 160k iterations.
_base_ = './swin_80k.py'
train_cfg = dict(max_iters=160_000)
param_scheduler = [*_base_.param_scheduler[:-1], dict(_base_.param_scheduler[-1], end=160_000)]
