# This project's choice: a pair that ACmix's paper has not, in PVT's release of Mask R-CNN.
_base_ = [
    '../_base_/models/mask-rcnn_fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/pvt_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(backbone=_base_.pop('backbone'), neck=dict(in_channels=_base_.pop('channels')))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
