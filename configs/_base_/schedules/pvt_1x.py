# ACmix, appendix: AdamW for PVT; epochs and steps as for ResNet.
_base_ = ['./schedule_1x.py', './decay_rules.py']
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=_base_.paramwise_cfg,
)
