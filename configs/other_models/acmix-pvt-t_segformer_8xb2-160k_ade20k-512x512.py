# SegFormer's recipe (MMSegmentation), with PVT-ACmix-T for MiT-B0. Sides of test images are
# enlarged to multiples of 32, as by PVT's release: PVT would leave the remainder out.
_base_ = [
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
    '../_base_/backbones/acmix-pvt-t.py',
]
custom_imports = dict(imports=['acmix_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.1),
    decode_head=dict(in_channels=_base_.pop('channels')),
)

test_pipeline = [
    *_base_.test_pipeline[:2],
    dict(type='ResizeToMultiple', size_divisor=32),
    *_base_.test_pipeline[2:],
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
