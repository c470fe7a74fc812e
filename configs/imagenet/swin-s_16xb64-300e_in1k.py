# mmdet's plain Swin-S by Swin's release.
_base_ = './swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(depths=[2, 2, 18, 2], drop_path_rate=0.3))
