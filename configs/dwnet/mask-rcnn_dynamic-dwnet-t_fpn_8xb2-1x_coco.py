_base_ = './mask-rcnn_dwnet-t_fpn_8xb2-1x_coco.py'
model = dict(
    backbone=dict(
        dynamic='homogeneous',
        init_cfg=dict(checkpoint='checkpoints/dynamic_dwnet_tiny_224.pth'),
    )
)
