_base_ = [
    '../_base_/models/retinanet_fpn.py',
    '../_base_/backbones/dwnet-t.py',
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/swin_1x.py',
    '../_base_/default_runtime.py',
]
# Stage 1 has no level in RetinaNet: its output norm would have no gradient.
model = dict(
    backbone=dict(_base_.backbone, out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.channels[1:], start_level=0),
)
