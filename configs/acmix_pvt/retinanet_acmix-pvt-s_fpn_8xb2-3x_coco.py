# This project's choice: PVT's optimiser with Swin's 3x schedule and multi-scale training.
_base_ = ['./retinanet_acmix-pvt-t_fpn_8xb2-3x_coco.py', '../_base_/backbones/acmix-pvt-s.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
