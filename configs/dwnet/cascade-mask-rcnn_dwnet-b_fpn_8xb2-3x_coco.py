_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn.py',
    '../_base_/backbones/dwnet-b.py',
    '../_base_/datasets/coco_instance_multi-scale.py',
    '../_base_/schedules/swin_3x.py',
    '../_base_/default_runtime.py',
]
model = dict(backbone=_base_.backbone, neck=dict(in_channels=_base_.channels))
