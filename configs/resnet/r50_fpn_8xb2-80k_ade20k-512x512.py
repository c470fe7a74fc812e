# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = ['../acmix_resnet/acmix-r50_fpn_8xb2-80k_ade20k-512x512.py', '../_base_/backbones/r50.py']
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        _delete_=True,
        frozen_stages=-1,
        norm_eval=False,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
    )
)
_base_.pop('channels')  # the same
