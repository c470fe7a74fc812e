# Plain ResNet-26 by the paper's recipe.
_base_ = './acmix-r26_8xb32-100e_in1k.py'
model = dict(backbone=dict(stage_with_acmix=(False, False, False, False)))
