# ResNet-50 with X-volution in its third stage, from its own ImageNet weights, for detection: stem
# and first stage frozen.
backbone = dict(
    type='XVolutionResNet',
    depth=50,
    frozen_stages=1,
    norm_eval=True,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/x-volution-r50_in1k.pth'),
)
channels = [256, 512, 1024, 2048]
