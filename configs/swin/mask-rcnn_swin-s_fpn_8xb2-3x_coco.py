# Swin's release, but in single precision.
_base_ = [
    '../acmix_swin/mask-rcnn_acmix-swin-s_fpn_8xb2-3x_coco.py',
    '../_base_/backbones/swin-s.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.2))
_base_.pop('channels')  # the same
