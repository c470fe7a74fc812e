_base_ = './cascade-mask-rcnn_acmix-pvt-t_fpn_8xb2-1x_coco.py'
model = dict(
    backbone=dict(num_layers=[3, 4, 6, 3], init_cfg=dict(checkpoint='checkpoints/pvt_small.pth'))
)
