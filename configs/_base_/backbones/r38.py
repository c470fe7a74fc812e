# Plain ResNet-38. Nobody publishes weights of it, so it starts from its own (configs/imagenet).
_base_ = './acmix-r38.py'
backbone = dict(
    stage_with_acmix=(False, False, False, False),
    init_cfg=dict(checkpoint='checkpoints/r38_in1k.pth'),
)
