# Combination of the paths (ACmix, section 5.4, Table 6): both with rate 1.
_base_ = '../demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(backbone=dict(mix='sum'))
