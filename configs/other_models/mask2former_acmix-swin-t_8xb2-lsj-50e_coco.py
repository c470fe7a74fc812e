# Mask2Former's recipe (MMDetection), with Swin-ACmix-T for Swin-T; its rates have no weight decay,
# as in ACmix's release of Swin.
_base_ = [
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
    '../_base_/backbones/acmix-swin-t.py',
]
custom_imports = dict(imports=['acmix_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(_base_.pop('backbone'), _delete_=True, drop_path_rate=0.3),
    panoptic_head=dict(in_channels=_base_.pop('channels')),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        # The longest name that fits counts, and one is "backbone".
        custom_keys={
            f'w_msa.{name}': dict(lr_mult=0.1, decay_mult=0.0) for name in ('rate1', 'rate2')
        }
    )
)
