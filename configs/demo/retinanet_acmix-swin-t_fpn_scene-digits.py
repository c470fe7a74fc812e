# RetinaNet with a small Swin-ACmix, as the demo with ResNet-ACmix 26.
_base_ = './retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='ACmixSwinTransformer',
        embed_dims=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        window_size=6,  # divides the maps of 24, 12 and 6 pixels
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[32, 64, 128, 256]),
)
