# UperNet with a small Swin-ACmix, to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/backbones/acmix-swin-t.py',
    '../_base_/datasets/scene_digits_semantic.py',
    '../_base_/schedules/schedule_demo_semantic.py',
    '../_base_/segmentation_demo_runtime.py',
]

norm_cfg = dict(type='BN')
# By default conv_seg starts at a tenth of that, so near equality of all classes that training from
# random weights stays there for thousands of iterations.
init_cfg = dict(type='Normal', std=0.1, override=dict(name='conv_seg'))
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(
        _base_.backbone,
        embed_dims=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        window_size=6,  # divides the maps of 24, 12 and 6 pixels
        drop_path_rate=0.0,
        warm_start=False,
        init_cfg=None,
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
    auxiliary_head=dict(
        in_channels=128,
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
)
