_base_ = './retinanet_acmix-san19_fpn_8xb2-1x_coco.py'
model = dict(backbone=dict(depth=15, init_cfg=dict(checkpoint='checkpoints/acmix-san15_in1k.pth')))
