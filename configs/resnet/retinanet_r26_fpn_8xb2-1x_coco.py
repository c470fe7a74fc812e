# ACmix, appendix (the plain network of the paper's pair).
_base_ = ['../acmix_resnet/retinanet_acmix-r26_fpn_8xb2-1x_coco.py', '../_base_/backbones/r26.py']
model = dict(backbone=_base_.pop('backbone'))
_base_.pop('channels')  # the same
