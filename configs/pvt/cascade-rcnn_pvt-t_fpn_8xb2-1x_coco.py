# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = [
    '../acmix_pvt/cascade-rcnn_acmix-pvt-t_fpn_8xb2-1x_coco.py',
    '../_base_/backbones/pvt-t.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True))
_base_.pop('channels')  # the same
