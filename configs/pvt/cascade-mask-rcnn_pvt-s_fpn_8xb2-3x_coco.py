# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = [
    '../acmix_pvt/cascade-mask-rcnn_acmix-pvt-s_fpn_8xb2-3x_coco.py',
    '../_base_/backbones/pvt-s.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True))
_base_.pop('channels')  # the same
