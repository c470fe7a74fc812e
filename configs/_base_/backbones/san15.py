# SAN 15, otherwise as san19.py.
_base_ = './san19.py'
backbone = dict(depth=15, init_cfg=dict(checkpoint='checkpoints/san15_patchwise.pth'))
