# ACmix, appendix (the paper's pair); Swin's release.
_base_ = [
    './acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/acmix-swin-s.py',
]
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
