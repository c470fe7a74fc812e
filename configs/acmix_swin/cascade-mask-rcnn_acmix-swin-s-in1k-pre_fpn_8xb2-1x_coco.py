# ACmix, appendix (the paper's pair), from the ImageNet weights of ACmix's release; otherwise the
# recipe from plain Swin's.
_base_ = [
    './cascade-mask-rcnn_acmix-swin-s_fpn_8xb2-1x_coco.py',
    '../_base_/backbones/acmix-swin-s-in1k-pre.py',
]
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
