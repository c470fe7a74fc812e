# SAN-ACmix 19 from its own ImageNet weights: stem and first two stages frozen, as in ResNets.
backbone = dict(
    type='ACmixSAN',
    depth=19,
    frozen_stages=1,
    norm_eval=True,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/acmix-san19_in1k.pth'),
)
channels = [256, 512, 1024, 2048]
