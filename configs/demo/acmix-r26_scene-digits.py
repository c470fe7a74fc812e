# Classifier of single digits with the demo detector's narrow ResNet-ACmix 26, to train on two CPU
# cores in some minutes; the detector can start from it.
_base_ = [
    '../_base_/models/image-classifier.py',
    '../_base_/datasets/scene_digits_classification.py',
    '../_base_/schedules/schedule_demo_classification.py',
    '../_base_/classification_demo_runtime.py',
]

model = dict(
    data_preprocessor=dict(num_classes=10),
    backbone=dict(
        type='ACmixResNet', depth=26, base_channels=32, out_indices=(3,), norm_eval=False
    ),
    head=dict(in_channels=1024, num_classes=10),
)
