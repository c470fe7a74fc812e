# This project's choice: Faster R-CNN with the appendix's schedule for ResNet.
_base_ = ['./faster-rcnn_acmix-r50_fpn_8xb2-1x_coco.py', '../_base_/backbones/acmix-r26.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
