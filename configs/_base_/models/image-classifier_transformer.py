# Image classifier of the transformers, and of what trains as they do: a random one of Mixup and
# CutMix for every batch.
_base_ = './image-classifier.py'
model = dict(
    neck=dict(_delete_=True, type='LastMapPooling'),
    head=dict(init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02)),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
