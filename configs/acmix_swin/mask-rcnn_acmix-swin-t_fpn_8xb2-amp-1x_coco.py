# ACmix, appendix (the paper's pair); Swin's release.
_base_ = './mask-rcnn_acmix-swin-t_fpn_8xb2-1x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
