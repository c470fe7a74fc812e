# The paper's control Conv-Swin-T, convolution in place of window attention, by Swin's recipe.
_base_ = './acmix-swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(mix='conv', conv_on_shifted=False))
