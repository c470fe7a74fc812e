# Shift (ACmix, section 5.4, Table 7): by shifts of tensors.
_base_ = '../imagenet/acmix-swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(shift='tensor'))
