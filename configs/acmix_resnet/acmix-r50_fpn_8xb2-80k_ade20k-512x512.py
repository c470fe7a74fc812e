# This project's choice: Semantic FPN with MMSegmentation's schedule for ResNet.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/backbones/acmix-r50.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_80k.py',
    '../_base_/segmentation_runtime.py',
]
# Everything is trained, with statistics over all GPUs.
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        frozen_stages=-1,
        norm_eval=False,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    ),
    neck=dict(in_channels=_base_.pop('channels')),
)
