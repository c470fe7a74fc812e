# Semantic FPN with a small PVT-ACmix, to train on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',
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
        pretrain_img_size=(96, 96)[0],
        embed_dims=32,
        num_heads=[1, 2, 4, 8],
        mlp_ratios=[4, 4, 4, 4],
        drop_path_rate=0.0,
        warm_start=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        init_cfg=init_cfg,
    ),
)
