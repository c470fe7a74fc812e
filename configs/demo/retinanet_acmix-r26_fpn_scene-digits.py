# RetinaNet with ResNet-ACmix 26, narrow enough to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/retinanet_fpn.py',
    '../_base_/backbones/acmix-r26.py',
    '../_base_/datasets/scene_digits_detection.py',
    '../_base_/schedules/schedule_demo.py',
    '../_base_/demo_runtime.py',
]

model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        base_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    # Neck and head start from random weights too. Digits are 10 to 46 pixels large: levels 2 to
    # 5, anchors from 16 pixels.
    neck=dict(
        in_channels=[128, 256, 512, 1024],
        out_channels=64,
        start_level=0,
        add_extra_convs=False,
        num_outs=4,
        norm_cfg=dict(type='BN'),
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(strides=[4, 8, 16, 32]),
    ),
)
_base_.pop('channels')  # this network is narrower
