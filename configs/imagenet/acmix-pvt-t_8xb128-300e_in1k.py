# PVT-ACmix-T by the paper's recipe, which is PVT's (ACmix, appendix B).
_base_ = './pvt-t_8xb128-300e_in1k.py'
model = dict(backbone=dict(type='ACmixPyramidVisionTransformer'))
