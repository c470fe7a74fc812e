# This project's choice: as Swin's release for Swin-T, but in single precision.
_base_ = [
    '../acmix_swin/cascade-mask-rcnn_acmix-swin-s_fpn_8xb2-1x_coco.py',
    '../_base_/backbones/swin-s.py',
]
model = dict(backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.0))
_base_.pop('channels')  # the same
