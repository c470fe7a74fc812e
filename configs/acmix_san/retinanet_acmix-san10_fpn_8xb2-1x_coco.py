_base_ = './retinanet_acmix-san19_fpn_8xb2-1x_coco.py'
model = dict(backbone=dict(depth=10, init_cfg=dict(checkpoint='checkpoints/acmix-san10_in1k.pth')))
