_base_ = './retinanet_san19_fpn_8xb2-1x_coco.py'
model = dict(backbone=dict(depth=15, init_cfg=dict(checkpoint='checkpoints/san15_patchwise.pth')))
