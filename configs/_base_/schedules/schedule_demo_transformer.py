# As schedule_demo.py, at a rate that transformers bear, and for more epochs.
_base_ = ['./schedule_demo.py', './decay_rules.py']
max_epochs = 5
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=_base_.paramwise_cfg)
param_scheduler = [
    dict(_base_.param_scheduler[0], end=100),
    dict(_base_.param_scheduler[1], end=max_epochs, T_max=max_epochs),
]
