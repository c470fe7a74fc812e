# RetinaNet with ResNet-ACmix 26, narrow enough to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/retinanet_acmix-r50_fpn.py',
    '../_base_/datasets/scene_digits_detection.py',
    '../_base_/schedules/schedule_demo.py',
    '../_base_/demo_runtime.py',
]

model = dict(
    # From random weights: nothing is frozen, and batch statistics are learned.
    backbone=dict(
        depth=26,
        base_channels=32,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    # Digits are 10 to 56 pixels large: levels 3 to 5, anchors of 16 to 101 pixels.
    neck=dict(
        in_channels=[256, 512, 1024],
        out_channels=64,
        start_level=0,
        add_extra_convs=False,
        num_outs=3,
    ),
    bbox_head=dict(
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32]),
    ),
)
