# This project's choice: Cascade R-CNN with the appendix's schedule for SAN.
_base_ = [
    '../_base_/models/cascade-rcnn_fpn.py',
    '../_base_/backbones/acmix-san19.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/schedule_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(backbone=_base_.pop('backbone'), neck=dict(in_channels=_base_.pop('channels')))
