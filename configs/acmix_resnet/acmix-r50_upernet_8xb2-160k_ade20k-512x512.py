# This project's choice: UperNet with MMSegmentation's schedule for ResNet.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/backbones/acmix-r50.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/schedule_160k.py',
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
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.pop('channels')[2]),
)
