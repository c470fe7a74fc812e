# This project's choice: Semantic FPN with Swin's optimiser.
_base_ = ['./acmix-swin-t_fpn_8xb2-80k_ade20k-512x512.py', '../_base_/backbones/acmix-swin-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
