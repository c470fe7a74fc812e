# Classifier with ResNet-ACmix 26, as narrow as in the detector on scene digits, which can start from
# it; trains on two CPU cores in some minutes.
_base_ = [
    '../_base_/models/image-classifier.py',
    '../_base_/datasets/scene_digits_classification.py',
    '../_base_/schedules/schedule_demo_classification.py',
    '../_base_/classification_demo_runtime.py',
]

model = dict(
    backbone=dict(
        type='ACmixResNet', depth=26, base_channels=32, out_indices=(3,), norm_eval=False
    ),
    head=dict(in_channels=1024, num_classes=10),
)
