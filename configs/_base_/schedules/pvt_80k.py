# ACmix, appendix: AdamW for PVT, poly decay to zero.
_base_ = ['./schedule_80k.py', './decay_rules.py']
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=_base_.paramwise_cfg,
)
param_scheduler = [dict(_base_.param_scheduler[0], eta_min=0.0)]
