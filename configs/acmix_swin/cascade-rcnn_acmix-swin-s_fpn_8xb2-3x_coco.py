# This project's choice: Cascade R-CNN with the schedule of Swin's release for Cascade Mask R-CNN.
_base_ = ['./cascade-rcnn_acmix-swin-t_fpn_8xb2-3x_coco.py', '../_base_/backbones/acmix-swin-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
