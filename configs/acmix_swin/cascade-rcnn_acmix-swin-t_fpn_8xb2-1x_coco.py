# This project's choice: Cascade R-CNN with the schedule of Swin's release for Cascade Mask R-CNN.
_base_ = [
    '../_base_/models/cascade-rcnn_fpn.py',
    '../_base_/backbones/acmix-swin-t.py',
    '../_base_/datasets/coco_detection_multi-scale.py',
    '../_base_/schedules/swin_1x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_base_.pop('backbone'), drop_path_rate=0.0),
    neck=dict(in_channels=_base_.pop('channels')),
)
