# ResNet-50 with X-volution in its third stage, from its own ImageNet weights (configs/imagenet),
# otherwise as acmix-r50.py.
_base_ = './acmix-r50.py'
backbone = dict(
    type='XVolutionResNet', init_cfg=dict(checkpoint='checkpoints/x-volution-r50_in1k.pth')
)
