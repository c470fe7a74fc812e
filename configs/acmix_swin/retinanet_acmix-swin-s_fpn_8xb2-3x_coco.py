# This project's choice: RetinaNet with the schedule of Swin's release for Mask R-CNN.
_base_ = ['./retinanet_acmix-swin-t_fpn_8xb2-3x_coco.py', '../_base_/backbones/acmix-swin-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
