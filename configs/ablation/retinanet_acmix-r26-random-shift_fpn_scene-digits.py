# Shift (ACmix, section 5.4, Table 7): by convolution with learned kernels that start at random.
_base_ = '../demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(backbone=dict(shift='random'))
