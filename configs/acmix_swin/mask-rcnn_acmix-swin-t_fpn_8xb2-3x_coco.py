# ACmix, appendix (the paper's pair); Swin's release, but in single precision.
_base_ = [
    '../_base_/models/mask-rcnn_fpn.py',
    '../_base_/backbones/acmix-swin-t.py',
    '../_base_/datasets/coco_instance_multi-scale.py',
    '../_base_/schedules/swin_3x.py',
    '../_base_/default_runtime.py',
]
model = dict(
    backbone=dict(_base_.pop('backbone'), drop_path_rate=0.2),
    neck=dict(in_channels=_base_.pop('channels')),
)
