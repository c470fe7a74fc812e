# ACmix, appendix (the paper's pair); Swin's release.
_base_ = './cascade-mask-rcnn_acmix-swin-t_fpn_8xb2-3x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
