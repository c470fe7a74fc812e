# DWNet-T by its release, which is Swin's recipe, with 8 GPUs and 128 images each.
_base_ = [
    '../_base_/backbones/dwnet-t.py',
    '../_base_/models/image-classifier_transformer.py',
    '../_base_/datasets/imagenet_randaugment.py',
    '../_base_/schedules/imagenet_swin_300e.py',
    '../_base_/classification_runtime.py',
]
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        drop_path_rate=0.2,
        norm_cfg=dict(type='BN'),
        convert_weights=False,
        init_cfg=None,
        out_indices=(3,),
    ),
    head=dict(in_channels=_base_.pop('channels')[-1]),
)
train_dataloader = dict(batch_size=128)
