# SAN 19 from its authors' ImageNet weights: stem and first two stages frozen, as in ResNets.
backbone = dict(
    type='SAN',
    depth=19,
    frozen_stages=1,
    norm_eval=True,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/san19_patchwise.pth'),
)
channels = [256, 512, 1024, 2048]
