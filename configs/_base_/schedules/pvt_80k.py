# PVT's release for Semantic FPN: AdamW, with weight decay on everything, poly decay to zero.
_base_ = './schedule_80k.py'
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4))
param_scheduler = [dict(_base_.param_scheduler[0], eta_min=0.0)]
