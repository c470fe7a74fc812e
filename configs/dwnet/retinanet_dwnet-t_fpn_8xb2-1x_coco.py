# This project's choice: RetinaNet with the schedule of Swin's release for Mask R-CNN.
_base_ = [
    '../_base_/models/retinanet_fpn.py',
    '../_base_/backbones/dwnet-t.py',
    '../_base_/datasets/coco_detection_multi-scale.py',
    '../_base_/schedules/swin_1x.py',
    '../_base_/default_runtime.py',
]
# Stage 1 has no level in RetinaNet: its output norm would have no gradient.
model = dict(
    backbone=dict(_base_.pop('backbone'), drop_path_rate=0.1, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.pop('channels')[1:], start_level=0),
)
