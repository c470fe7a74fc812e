# This project's choice: the paper's control Conv-Swin in the recipe of Swin-ACmix.
_base_ = ['./mask-rcnn_acmix-swin-t_fpn_8xb2-1x_coco.py', '../_base_/backbones/conv-swin-t.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
