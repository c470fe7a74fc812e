# ACmix, appendix (the paper's pair).
_base_ = ['./retinanet_acmix-san19_fpn_8xb2-1x_coco.py', '../_base_/backbones/acmix-san15.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
