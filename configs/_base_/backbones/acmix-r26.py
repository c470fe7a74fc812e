# ResNet-ACmix 26, otherwise as acmix-r50.py.
_base_ = './acmix-r50.py'
backbone = dict(depth=26, init_cfg=dict(checkpoint='checkpoints/acmix-r26_in1k.pth'))
