# DWNet's release, but in single precision.
_base_ = [
    './cascade-mask-rcnn_dwnet-b_fpn_8xb2-3x_coco.py',
    '../_base_/backbones/dynamic-dwnet-b.py',
]
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
