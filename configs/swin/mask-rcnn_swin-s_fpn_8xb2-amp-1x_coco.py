# This project's choice: as Swin's release for Swin-T.
_base_ = './mask-rcnn_swin-s_fpn_8xb2-1x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
