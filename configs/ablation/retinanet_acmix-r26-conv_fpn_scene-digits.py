# Combination of the paths (ACmix, section 5.4, Table 6): the convolution path alone.
_base_ = '../demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(backbone=dict(mix='conv'))
