_base_ = './retinanet_dwnet-t_fpn_8xb2-1x_coco.py'
model = dict(
    backbone=dict(
        dynamic='inhomogeneous',
        init_cfg=dict(checkpoint='checkpoints/i_dynamic_dwnet_tiny_224.pth'),
    )
)
