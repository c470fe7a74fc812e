# Plain ResNet-26. Nobody publishes weights of it, so it starts from its own (configs/imagenet).
_base_ = './acmix-r26.py'
backbone = dict(
    stage_with_acmix=(False, False, False, False),
    init_cfg=dict(checkpoint='checkpoints/r26_in1k.pth'),
)
