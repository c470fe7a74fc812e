# This project's choice: Semantic FPN with MMSegmentation's schedule for ResNet.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/backbones/acmix-san19.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_80k.py',
    '../_base_/segmentation_runtime.py',
]
# All weights are trained; norms keep the statistics of the ImageNet weights.
model = dict(
    backbone=dict(_base_.pop('backbone'), frozen_stages=-1),
    neck=dict(in_channels=_base_.pop('channels')),
)
