# ACmix, appendix (the paper's pair); PVT's release.
_base_ = [
    '../_base_/models/retinanet_fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/pvt_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(backbone=_base_.pop('backbone'), neck=dict(in_channels=_base_.pop('channels')))
