# ResNet-50 with X-volution in its third stage by ResNet's recipe, which is this project's choice.
_base_ = './acmix-r50_8xb32-100e_in1k.py'
model = dict(backbone=dict(type='XVolutionResNet'))
