# mmdet's plain PVT-T by PVT's release, with 8 GPUs and 128 images each. The head is this project's
# choice: the release classifies a token, which its backbone for dense prediction does not have;
# here it is the mean over the map. With repeated augmentation, an epoch has a third of the images,
# each three times.
_base_ = [
    '../_base_/backbones/pvt-t.py',
    '../_base_/models/image-classifier_transformer.py',
    '../_base_/datasets/imagenet_randaugment.py',
    '../_base_/schedules/imagenet_pvt_300e.py',
    '../_base_/classification_runtime.py',
]
model = dict(
    backbone=dict(
        _base_.pop('backbone'),
        type='mmdet.PyramidVisionTransformer',
        drop_path_rate=0.1,
        convert_weights=False,
        init_cfg=None,
        out_indices=(3,),
    ),
    neck=dict(norm_channels=_base_.channels[-1]),
    head=dict(in_channels=_base_.pop('channels')[-1]),
)
train_dataloader = dict(batch_size=128, sampler=dict(type='RepeatAugSampler'))
