# This project's choice: UperNet with PVT's optimiser.
_base_ = ['./acmix-pvt-t_upernet_8xb2-160k_ade20k-512x512.py', '../_base_/backbones/acmix-pvt-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
