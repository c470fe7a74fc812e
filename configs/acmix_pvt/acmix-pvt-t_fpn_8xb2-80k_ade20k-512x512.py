# ACmix, appendix (the paper's pair); PVT's release.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',
    '../_base_/datasets/ade20k_align-32.py',
    '../_base_/schedules/pvt_80k.py',
    '../_base_/segmentation_runtime.py',
]
model = dict(backbone=_base_.pop('backbone'), neck=dict(in_channels=_base_.pop('channels')))
