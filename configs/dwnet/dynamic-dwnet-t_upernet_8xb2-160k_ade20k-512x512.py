# DWNet's release.
_base_ = ['./dwnet-t_upernet_8xb2-160k_ade20k-512x512.py', '../_base_/backbones/dynamic-dwnet-t.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
