# RetinaNet with X-volution in the third stage of ResNet-26, as the demo with ResNet-ACmix 26.
_base_ = './retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(
        _delete_=True, type='XVolutionResNet', depth=26, base_channels=32, norm_eval=False
    ),
)
