# A class for each pixel of pictures of your own, from PNG label maps: Semantic FPN with
# PVT-ACmix-T. Copy this file, change what stands at the top, and see docs/own_data.md.
_base_ = [
    '../_base_/models/semantic-fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',  # or another of that folder
    '../_base_/datasets/ade20k_align-32.py',
    '../_base_/schedules/own_data.py',
    '../_base_/segmentation_runtime.py',
]

data_root = 'data/own/'
classes = ('background', 'cat', 'dog')  # of the labels 0, 1, 2; 255 is of no class
reduce_zero_label = False  # True: label 0 is of no class, too, and 1 is that of the first
train_pictures, train_labels = 'images/train', 'labels/train'
val_pictures, val_labels = 'images/val', 'labels/val'
suffix = '.jpg'  # of the pictures; label maps are .png
size = 512  # of the crops that are trained on; the shorter side of pictures in tests
batch_size = 4
epochs = 60
from_scratch = False  # True: from random weights, which takes many more epochs

# Without ImageNet weights, neck and heads need norms, here of each picture for itself, so that
# batches may be small.
norm_cfg = dict(type='GN', num_groups=32, requires_grad=True) if from_scratch else None
start = dict(init_cfg=None, warm_start=False, convert_weights=False) if from_scratch else {}
metainfo = dict(classes=classes)
resize = dict(
    RandomResize=dict(scale=(4 * size, size)),
    RandomCrop=dict(crop_size=(size, size)),
    Resize=dict(scale=(4 * size, size)),
)
train_pipeline = [dict(step, **resize.get(step.type, {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **resize.get(step.type, {})) for step in _base_.test_pipeline]
tta_pipeline = [
    _base_.tta_pipeline[0],
    dict(
        _base_.tta_pipeline[1],
        transforms=[
            [
                dict(type='Resize', scale=(int(4 * size * r), int(size * r)), keep_ratio=True)
                for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            *_base_.tta_pipeline[1].transforms[1:],
        ],
    ),
]
del resize

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=2,
    sampler=dict(type='DefaultSampler'),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path=train_pictures, seg_map_path=train_labels),
        img_suffix=suffix,
        metainfo=metainfo,
        reduce_zero_label=reduce_zero_label,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    num_workers=2,
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        data_prefix=dict(img_path=val_pictures, seg_map_path=val_labels),
        img_suffix=suffix,
        metainfo=metainfo,
        reduce_zero_label=reduce_zero_label,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

model = dict(
    data_preprocessor=dict(size=(size, size)),
    backbone=dict(_base_.pop('backbone'), **start),
    neck=dict(in_channels=_base_.pop('channels'), norm_cfg=norm_cfg),
    decode_head=dict(
        num_classes=len(classes),
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        # mmseg's heads start the last convolution at 0.01: all classes are as likely, gradients
        # small, and from scratch the model predicts the most frequent class for thousands of
        # iterations.
        init_cfg=dict(type='Normal', std=0.1, override=dict(name='conv_seg')),
    ),
)

train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(optimizer=dict(lr=5e-4 if from_scratch else 1e-4))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=epochs, T_max=epochs),
]
default_hooks = dict(
    logger=dict(log_metric_by_epoch=True), checkpoint=dict(by_epoch=True, interval=1)
)
log_processor = dict(by_epoch=True)
del norm_cfg, start
