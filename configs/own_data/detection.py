# Boxes in pictures of your own, annotated in COCO's format: RetinaNet with PVT-ACmix-T. Copy this
# file, change what stands at the top, and see docs/own_data.md.
_base_ = [
    '../_base_/models/retinanet_fpn.py',
    '../_base_/backbones/acmix-pvt-t.py',  # or another of that folder
    '../_base_/datasets/coco_detection.py',
    '../_base_/schedules/own_data.py',
    '../_base_/default_runtime.py',
]

data_root = 'data/own/'
classes = ('cat', 'dog')  # all of the annotation files, in their order
train_file, train_pictures = 'annotations/train.json', 'train/'
val_file, val_pictures = 'annotations/val.json', 'val/'
size = (1333, 800)  # the longer and the shorter side to which pictures are resized, at most
batch_size = 4
epochs = 24
from_scratch = False  # True: from random weights, which takes many more epochs

# Without ImageNet weights, neck and heads need norms, here of each picture for itself, so that
# batches may be small.
norm_cfg = dict(type='GN', num_groups=32, requires_grad=True) if from_scratch else None
start = dict(init_cfg=None, warm_start=False, convert_weights=False) if from_scratch else {}
metainfo = dict(classes=classes)
resize = dict(Resize=dict(scale=size))
train_pipeline = [dict(step, **resize.get(step.type, {})) for step in _base_.train_pipeline]
test_pipeline = [dict(step, **resize.get(step.type, {})) for step in _base_.test_pipeline]
del resize

train_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        data_root=data_root,
        ann_file=train_file,
        data_prefix=dict(img=train_pictures),
        metainfo=metainfo,
        filter_cfg=dict(min_size=1),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=batch_size,
    dataset=dict(
        data_root=data_root,
        ann_file=val_file,
        data_prefix=dict(img=val_pictures),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_file)
test_evaluator = val_evaluator

model = dict(
    backbone=dict(_base_.pop('backbone'), **start),
    neck=dict(in_channels=_base_.pop('channels'), norm_cfg=norm_cfg),
    bbox_head=dict(num_classes=len(classes), norm_cfg=norm_cfg),
)

train_cfg = dict(max_epochs=epochs)
optim_wrapper = dict(optimizer=dict(lr=5e-4 if from_scratch else 1e-4))
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=epochs, T_max=epochs),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
del norm_cfg, start
