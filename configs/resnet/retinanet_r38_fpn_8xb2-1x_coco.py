# ACmix, appendix (the plain network of the paper's pair).
_base_ = ['../acmix_resnet/retinanet_acmix-r38_fpn_8xb2-1x_coco.py', '../_base_/backbones/r38.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
