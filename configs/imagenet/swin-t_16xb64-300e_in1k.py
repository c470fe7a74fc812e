# mmdet's plain Swin-T by Swin's release, whose 1024 images a step are divided as mmpretrain does.
_base_ = [
    '../_base_/backbones/swin-t.py',
    '../_base_/models/image-classifier_transformer.py',
    '../_base_/datasets/imagenet_randaugment.py',
    '../_base_/schedules/imagenet_swin_300e.py',
    '../_base_/classification_runtime.py',
]
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        type='mmdet.SwinTransformer',
        drop_path_rate=0.2,
        convert_weights=False,
        init_cfg=None,
        out_indices=(3,),
    ),
    head=dict(in_channels=_base_.pop('channels')[-1]),
)
