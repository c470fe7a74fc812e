# PVT's release.
_base_ = ['../acmix_pvt/acmix-pvt-t_fpn_8xb2-80k_ade20k-512x512.py', '../_base_/backbones/pvt-t.py']
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True))
_base_.pop('channels')  # the same
