# SAN-ACmix 19 by the paper's recipe.
_base_ = './san19_8xb32-100e_in1k.py'
model = dict(backbone=dict(type='ACmixSAN'))
