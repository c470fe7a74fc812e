# This project's choice: PVT's optimiser for Swin's 36 epochs, times 0.1 after epochs 27 and 33.
_base_ = './pvt_1x.py'
train_cfg = dict(max_epochs=36)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=36, milestones=[27, 33]),
]
