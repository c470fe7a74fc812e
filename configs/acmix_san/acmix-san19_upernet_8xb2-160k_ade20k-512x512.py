# This project's choice: UperNet with MMSegmentation's schedule for ResNet.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/backbones/acmix-san19.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_160k.py',
    '../_base_/segmentation_runtime.py',
]
# All weights are trained; norms keep the statistics of the ImageNet weights.
model = dict(
    backbone=dict(_base_.pop('backbone'), frozen_stages=-1),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.pop('channels')[2]),
)
