# This project's choice: the ACmix recipe, with the plain network in place of ACmix.
_base_ = ['../acmix_pvt/retinanet_acmix-pvt-t_fpn_8xb2-3x_coco.py', '../_base_/backbones/pvt-t.py']
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True))
_base_.pop('channels')  # the same
