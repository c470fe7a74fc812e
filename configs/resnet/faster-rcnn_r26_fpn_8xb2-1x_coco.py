# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = ['../acmix_resnet/faster-rcnn_acmix-r26_fpn_8xb2-1x_coco.py', '../_base_/backbones/r26.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
