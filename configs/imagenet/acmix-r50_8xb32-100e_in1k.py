# ResNet-ACmix 50 by the paper's recipe (ACmix, appendix B).
_base_ = [
    '../_base_/backbones/acmix-r50.py',
    '../_base_/models/image-classifier.py',
    '../_base_/datasets/imagenet.py',
    '../_base_/schedules/imagenet_100e.py',
    '../_base_/classification_runtime.py',
]
model = dict(
    backbone=dict(
        _base_.pop('backbone'), frozen_stages=-1, norm_eval=False, init_cfg=None, out_indices=(3,)
    ),
    head=dict(in_channels=_base_.pop('channels')[-1]),
)
