# DWNet-B, otherwise as dwnet-t.py; stochastic depth for detection and segmentation.
_base_ = './dwnet-t.py'
backbone = dict(
    arch='base',
    drop_path_rate=0.3,
    init_cfg=dict(checkpoint='checkpoints/dwnet_base_224.pth'),
)
channels = [128, 256, 512, 1024]
