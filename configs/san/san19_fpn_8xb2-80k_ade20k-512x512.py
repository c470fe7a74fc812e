# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = ['../acmix_san/acmix-san19_fpn_8xb2-80k_ade20k-512x512.py', '../_base_/backbones/san19.py']
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, frozen_stages=-1))
_base_.pop('channels')  # the same
