# SAN 15 by its release's recipe.
_base_ = './san19_8xb32-100e_in1k.py'
model = dict(backbone=dict(depth=15))
