# Shift (ACmix, section 5.4, Table 7): by convolution with learned kernels that start at random.
_base_ = '../imagenet/acmix-swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(shift='random'))
