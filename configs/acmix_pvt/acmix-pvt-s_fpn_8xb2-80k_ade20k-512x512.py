_base_ = './acmix-pvt-t_fpn_8xb2-80k_ade20k-512x512.py'
model = dict(
    backbone=dict(num_layers=[3, 4, 6, 3], init_cfg=dict(checkpoint='checkpoints/pvt_small.pth'))
)
