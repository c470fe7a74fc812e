# ACmix, appendix: AdamW for Swin, with the longer warm-up of Swin's own recipe.
_base_ = ['./schedule_1x.py', './decay_rules.py']
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=_base_.paramwise_cfg,
)
param_scheduler = [dict(_base_.param_scheduler[0], end=1000), _base_.param_scheduler[1]]
