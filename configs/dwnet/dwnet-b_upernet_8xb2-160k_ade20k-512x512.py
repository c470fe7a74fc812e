# DWNet's release.
_base_ = [
    '../_base_/models/upernet.py',
    '../_base_/backbones/dwnet-b.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/swin_160k.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(
    backbone=dict(_base_.pop('backbone'), drop_path_rate=0.3),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.pop('channels')[2]),
)
