# FCOS's recipe (MMDetection), with ResNet-ACmix 50 for ResNet-50, and the preprocessing that its
# weights were trained with.
_base_ = [
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    '../_base_/backbones/acmix-r50.py',
]
custom_imports = dict(imports=['acmix_mm'], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(_base_.pop('backbone'), _delete_=True),
    neck=dict(in_channels=_base_.pop('channels')),
)
