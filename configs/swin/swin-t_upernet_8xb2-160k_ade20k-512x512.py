# Swin's release.
_base_ = [
    '../acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/swin-t.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3))
_base_.pop('channels')  # the same
