# This project's choice: Mask R-CNN with the schedule of Swin's release for Mask R-CNN.
_base_ = ['./mask-rcnn_dwnet-t_fpn_8xb2-1x_coco.py', '../_base_/backbones/dynamic-dwnet-t.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
