# This project's choice: Cascade Mask R-CNN with the appendix's schedule for PVT.
_base_ = [
    './cascade-mask-rcnn_acmix-pvt-t_fpn_8xb2-1x_coco.py',
    '../_base_/backbones/acmix-pvt-s.py',
]
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
