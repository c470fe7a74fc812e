# PVT-ACmix-T from plain PVT's ImageNet weights: at the start of training the attention path counts
# alone.
_base_ = './pvt-t.py'
backbone = dict(type='ACmixPyramidVisionTransformer', warm_start=True)
