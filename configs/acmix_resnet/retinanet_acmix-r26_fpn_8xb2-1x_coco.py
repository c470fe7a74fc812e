# ACmix, appendix (the paper's pair).
_base_ = ['./retinanet_acmix-r50_fpn_8xb2-1x_coco.py', '../_base_/backbones/acmix-r26.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
