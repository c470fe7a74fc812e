# mmdet's plain ResNet-50 by the paper's recipe.
_base_ = './acmix-r50_8xb32-100e_in1k.py'
model = dict(backbone=dict(type='mmdet.ResNet'))
