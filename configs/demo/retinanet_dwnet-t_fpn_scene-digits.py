# RetinaNet with a small DWNet, as the demo with ResNet-ACmix 26.
_base_ = './retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='DWNet',
        arch=dict(embed_dims=32, depths=[2, 2, 2, 2]),
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[32, 64, 128, 256]),
)
