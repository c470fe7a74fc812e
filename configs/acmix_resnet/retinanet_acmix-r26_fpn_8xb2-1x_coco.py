_base_ = './retinanet_acmix-r50_fpn_8xb2-1x_coco.py'
model = dict(
    backbone=dict(depth=26, init_cfg=dict(checkpoint='checkpoints/acmix-r26_in1k.pth')),
)
