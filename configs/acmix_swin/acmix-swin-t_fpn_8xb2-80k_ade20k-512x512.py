# This project's choice: Semantic FPN with Swin's optimiser.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/backbones/acmix-swin-t.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/swin_80k.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    backbone=dict(_base_.pop('backbone'), drop_path_rate=0.3),
    neck=dict(in_channels=_base_.pop('channels')),
)
