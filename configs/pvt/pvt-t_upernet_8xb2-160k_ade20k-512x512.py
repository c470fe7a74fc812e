# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = [
    '../acmix_pvt/acmix-pvt-t_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/pvt-t.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True))
_base_.pop('channels')  # the same
