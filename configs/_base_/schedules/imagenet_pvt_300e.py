# PVT's release, otherwise as imagenet_swin_300e.py: a warm-up over 5 epochs and the cosine in steps
# of an epoch, no clipping. PVT's position embeddings, of other names than Swin's, decay.
_base_ = './imagenet_swin_300e.py'
optim_wrapper = dict(clip_grad=None)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=5, end=300, T_max=295),
]
