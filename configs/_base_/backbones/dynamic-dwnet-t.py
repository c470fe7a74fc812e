# DWNet-T with kernels predicted from the whole image, otherwise as dwnet-t.py.
_base_ = './dwnet-t.py'
backbone = dict(
    dynamic='homogeneous',
    init_cfg=dict(
        checkpoint='https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/'
        'dynamic_dwnet_tiny_224.pth'
    ),
)
