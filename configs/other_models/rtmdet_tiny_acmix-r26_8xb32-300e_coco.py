# RTMDet's recipe (MMDetection), RTMDet-tiny with a ResNet-ACmix 26 of half the width. RTMDet starts
# from ImageNet weights of CSPNeXt; nobody has any of this network, which starts from random ones.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    '../_base_/backbones/acmix-r26.py',
]
custom_imports = dict(imports=['acmix_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        _delete_=True,
        base_channels=32,
        out_indices=(1, 2, 3),  # strides 8, 16 and 32
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False,
        frozen_stages=-1,
        init_cfg=None,
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
_base_.pop('channels')  # this network is narrower
