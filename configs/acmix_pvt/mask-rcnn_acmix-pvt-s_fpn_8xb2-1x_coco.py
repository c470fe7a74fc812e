# This project's choice: a pair that ACmix's paper has not, in PVT's release of Mask R-CNN.
_base_ = ['./mask-rcnn_acmix-pvt-t_fpn_8xb2-1x_coco.py', '../_base_/backbones/acmix-pvt-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
