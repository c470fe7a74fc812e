# DeepLabV3+'s recipe (MMSegmentation), with ResNet-ACmix 50 for ResNet-50, dilated from stride 8
# on.
_base_ = [
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py',
    '../_base_/backbones/acmix-r50.py',
]
custom_imports = dict(imports=['acmix_mm'], allow_failed_imports=False)
model = dict(
    pretrained=None,
    backbone=dict(
        _base_.pop('backbone'),
        _delete_=True,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        norm_eval=False,
        frozen_stages=-1,
    ),
)
_base_.pop('channels')  # the heads are for these
