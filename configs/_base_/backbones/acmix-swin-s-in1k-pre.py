# Swin-ACmix-S from its authors' ImageNet weights, to be downloaded from the links in their README
# (github.com/LeapLabTHU/ACmix).
_base_ = './acmix-swin-s.py'
backbone = dict(
    warm_start=False,
    init_cfg=dict(checkpoint='checkpoints/acmix_swin_small_patch4_window7_224.pth'),
)
