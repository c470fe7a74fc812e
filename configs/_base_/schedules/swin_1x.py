# Swin's release: AdamW with decay exempt by name; warm-up, epochs and steps as for ResNet.
_base_ = ['./schedule_1x.py', './swin_decay.py']
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=_base_.pop('paramwise_cfg'),
)
