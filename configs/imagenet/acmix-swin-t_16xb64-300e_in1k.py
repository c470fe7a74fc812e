# Swin-ACmix-T by the paper's recipe, which is Swin's (ACmix, appendix B, and its release).
_base_ = './swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(type='ACmixSwinTransformer'))
