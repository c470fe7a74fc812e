# DINO's recipe (MMDetection), with ResNet-ACmix 50 for ResNet-50.
_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    '../_base_/backbones/acmix-r50.py',
]
custom_imports = dict(imports=['acmix_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        _delete_=True,
        out_indices=(1, 2, 3),  # strides 8, 16 and 32
        norm_cfg=dict(type='BN', requires_grad=False),
    ),
    neck=dict(in_channels=_base_.pop('channels')[1:]),
)
