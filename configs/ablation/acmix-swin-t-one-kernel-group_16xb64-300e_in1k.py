# Kernel groups (ACmix, section 4.3): one, so that all outputs of a head position share a kernel.
_base_ = '../imagenet/acmix-swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(kernel_groups=1))
