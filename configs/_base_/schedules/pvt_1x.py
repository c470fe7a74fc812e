# PVT's release: AdamW, with weight decay on everything; warm-up, epochs and steps as for ResNet.
_base_ = './schedule_1x.py'
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4))
