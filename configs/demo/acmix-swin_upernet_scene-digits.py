# UperNet with a small Swin-ACmix, to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/models/segmentation_demo_head.py',
    '../_base_/backbones/acmix-swin-t.py',
    '../_base_/datasets/scene_digits_semantic.py',
    '../_base_/schedules/schedule_demo_semantic.py',
    '../_base_/segmentation_demo_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        _base_.pop('backbone'),
        embed_dims=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        window_size=6,  # divides the maps of 24, 12 and 6 pixels
        drop_path_rate=0.0,
        warm_start=False,
        init_cfg=None,
    ),
    decode_head=dict(_base_.demo_head, in_channels=[32, 64, 128, 256]),
    auxiliary_head=dict(_base_.pop('demo_head'), in_channels=128),
)
_base_.pop('channels')  # this network is narrower
