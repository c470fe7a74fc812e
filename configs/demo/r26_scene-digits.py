# The same with the plain ResNet of the same depth.
_base_ = './acmix-r26_scene-digits.py'
model = dict(backbone=dict(stage_with_acmix=(False, False, False, False)))
