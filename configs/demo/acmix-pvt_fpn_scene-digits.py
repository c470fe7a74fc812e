# Semantic FPN with a small PVT-ACmix, to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/models/segmentation_demo_head.py',
    '../_base_/backbones/acmix-pvt-t.py',
    '../_base_/datasets/scene_digits_semantic.py',
    '../_base_/schedules/schedule_demo_semantic.py',
    '../_base_/segmentation_demo_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        _base_.pop('backbone'),
        pretrain_img_size=96,
        embed_dims=32,
        num_heads=[1, 2, 4, 8],
        mlp_ratios=[4, 4, 4, 4],
        drop_path_rate=0.0,
        warm_start=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, norm_cfg=_base_.demo_head.norm_cfg),
    decode_head=dict(_base_.pop('demo_head'), in_channels=[64, 64, 64, 64]),
)
_base_.pop('channels')  # this network is narrower
