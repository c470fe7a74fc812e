# ACmix, appendix (the paper's pair), from the ImageNet weights of ACmix's release; otherwise the
# recipe from plain Swin's.
_base_ = [
    './acmix-swin-s_upernet_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/acmix-swin-s-in1k-pre.py',
]
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
