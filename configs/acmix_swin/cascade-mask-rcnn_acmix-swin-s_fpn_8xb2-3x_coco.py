# ACmix, appendix (the paper's pair); Swin's release, but in single precision.
_base_ = [
    './cascade-mask-rcnn_acmix-swin-t_fpn_8xb2-3x_coco.py',
    '../_base_/backbones/acmix-swin-s.py',
]
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
