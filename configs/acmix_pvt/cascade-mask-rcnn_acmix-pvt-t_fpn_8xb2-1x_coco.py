# This project's choice: Cascade Mask R-CNN with the appendix's schedule for PVT.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/pvt_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(backbone=_base_.pop('backbone'), neck=dict(in_channels=_base_.pop('channels')))
