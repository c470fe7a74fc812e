_base_ = './acmix-swin-t_fpn_8xb2-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        depths=[2, 2, 18, 2],
        init_cfg=dict(checkpoint='checkpoints/swin_small_patch4_window7_224.pth'),
    )
)
