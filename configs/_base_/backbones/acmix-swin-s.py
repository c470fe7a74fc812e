# Swin-ACmix-S from plain Swin's ImageNet weights: at the start of training the attention path
# counts alone.
_base_ = './swin-s.py'
backbone = dict(type='ACmixSwinTransformer', warm_start=True)
