# Combination of the paths (ACmix, section 5.4, Table 6): one learned rate, a and 1 - a.
_base_ = '../imagenet/acmix-swin-t_16xb64-300e_in1k.py'
model = dict(backbone=dict(mix='complementary'))
