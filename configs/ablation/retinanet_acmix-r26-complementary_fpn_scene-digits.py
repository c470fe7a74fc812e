# Combination of the paths (ACmix, section 5.4, Table 6): one learned rate, a and 1 - a.
_base_ = '../demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(backbone=dict(mix='complementary'))
