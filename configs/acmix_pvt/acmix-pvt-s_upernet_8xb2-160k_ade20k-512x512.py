_base_ = './acmix-pvt-t_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(num_layers=[3, 4, 6, 3], init_cfg=dict(checkpoint='checkpoints/pvt_small.pth'))
)
