# Swin's release.
_base_ = './cascade-mask-rcnn_swin-t_fpn_8xb2-3x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
