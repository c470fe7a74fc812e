# Mask R-CNN with a small Swin-ACmix, to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/mask-rcnn_fpn.py',
    '../_base_/backbones/acmix-swin-t.py',
    '../_base_/datasets/scene_digits_instance.py',
    '../_base_/schedules/schedule_demo_transformer.py',
    '../_base_/demo_runtime.py',
]

model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        embed_dims=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        window_size=6,  # divides the maps of 24, 12 and 6 pixels
        drop_path_rate=0.1,
        warm_start=False,
        init_cfg=None,
    ),
    # Neck and heads start from random weights.
    neck=dict(
        in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4, norm_cfg=dict(type='BN')
    ),
    # Digits are 10 to 46 pixels large: anchors from 16 pixels.
    rpn_head=dict(
        in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=14),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, finest_scale=14),
        mask_head=dict(
            in_channels=64,
            conv_out_channels=64,
            num_convs=2,
            num_classes=10,
            norm_cfg=dict(type='BN'),
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=16, pos_fraction=0.5)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=20)),
)
_base_.pop('channels')  # this network is narrower
