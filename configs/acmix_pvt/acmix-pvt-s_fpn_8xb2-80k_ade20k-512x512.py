# ACmix, appendix (the paper's pair); PVT's release.
_base_ = ['./acmix-pvt-t_fpn_8xb2-80k_ade20k-512x512.py', '../_base_/backbones/acmix-pvt-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
