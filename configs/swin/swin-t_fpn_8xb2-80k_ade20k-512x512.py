# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = [
    '../acmix_swin/acmix-swin-t_fpn_8xb2-80k_ade20k-512x512.py',
    '../_base_/backbones/swin-t.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3))
_base_.pop('channels')  # the same
