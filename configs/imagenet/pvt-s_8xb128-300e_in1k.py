# mmdet's plain PVT-S, otherwise as PVT-T.
_base_ = './pvt-t_8xb128-300e_in1k.py'
model = dict(backbone=dict(num_layers=[3, 4, 6, 3]))
