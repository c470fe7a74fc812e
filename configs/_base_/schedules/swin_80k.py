# Swin's release for UperNet: AdamW with decay exempt by name, linear warm-up over 1500 iterations,
# linear decay to zero.
_base_ = ['./schedule_80k.py', './swin_decay.py']
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=_base_.pop('paramwise_cfg'),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(_base_.param_scheduler[0], power=1.0, eta_min=0.0, begin=1500),
]
