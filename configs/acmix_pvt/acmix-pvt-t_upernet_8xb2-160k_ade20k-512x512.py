# This project's choice: UperNet with PVT's optimiser.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/backbones/acmix-pvt-t.py',
    '../_base_/datasets/ade20k_align-32.py',
    '../_base_/schedules/pvt_160k.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    backbone=_base_.pop('backbone'),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.pop('channels')[2]),
)
