# SAN 10, otherwise as san19.py.
_base_ = './san19.py'
backbone = dict(depth=10, init_cfg=dict(checkpoint='checkpoints/san10_patchwise.pth'))
