# COCO 2017 as in coco_detection.py, training images at many scales.
_base_ = ['./coco_detection.py', './multi_scale_resize.py']

train_pipeline = [
    _base_.pop('multi_scale_resize') if step.type == 'Resize' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
