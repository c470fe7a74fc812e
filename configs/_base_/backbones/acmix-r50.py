# ResNet-ACmix 50 from its own ImageNet weights (configs/imagenet), for detection: stem and first
# stage frozen, norms keep their statistics.
backbone = dict(
    type='ACmixResNet',
    depth=50,
    frozen_stages=1,
    norm_eval=True,
    init_cfg=dict(
        type='Pretrained', checkpoint='checkpoints/acmix-r50_in1k.pth', prefix='backbone.'
    ),
)
channels = [256, 512, 1024, 2048]
