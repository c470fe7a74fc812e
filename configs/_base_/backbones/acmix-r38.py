# ResNet-ACmix 38, otherwise as acmix-r50.py.
_base_ = './acmix-r50.py'
backbone = dict(depth=38, init_cfg=dict(checkpoint='checkpoints/acmix-r38_in1k.pth'))
