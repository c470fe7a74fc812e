# RTMDet with three stages of ResNet-ACmix 26, narrow enough to train on two CPU cores in some
# minutes.
_base_ = [
    '../_base_/models/rtmdet.py',
    '../_base_/backbones/acmix-r26.py',
    '../_base_/datasets/scene_digits_detection.py',
    '../_base_/schedules/schedule_demo.py',
    '../_base_/demo_runtime.py',
]

model = dict(
    # Digits are 10 to 46 pixels large: strides 4, 8 and 16.
    backbone=dict(
        _base_.pop('backbone'),
        base_channels=16,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256]),
)
_base_.pop('channels')  # this network is narrower

train_cfg = dict(max_epochs=8, val_interval=8)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=8, T_max=8),
]
