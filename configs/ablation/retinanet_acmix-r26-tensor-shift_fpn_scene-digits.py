# Shift (ACmix, section 5.4, Table 7): by shifts of tensors.
_base_ = '../demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(backbone=dict(shift='tensor'))
