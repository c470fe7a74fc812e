# DWNet-B, otherwise as dwnet-t.py.
_base_ = './dwnet-t.py'
backbone = dict(
    arch='base',
    init_cfg=dict(
        checkpoint='https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/'
        'dwnet_base_224.pth'
    ),
)
channels = [128, 256, 512, 1024]
