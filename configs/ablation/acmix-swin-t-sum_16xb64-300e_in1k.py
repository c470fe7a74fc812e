# Combination of the paths (ACmix, section 5.4, Table 6): both with rate 1.
_base_ = '../imagenet/acmix-swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(mix='sum'))
