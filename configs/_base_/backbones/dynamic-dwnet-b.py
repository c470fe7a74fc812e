# DWNet-B with kernels predicted from the whole image, otherwise as dwnet-b.py.
_base_ = './dwnet-b.py'
backbone = dict(
    dynamic='homogeneous',
    init_cfg=dict(
        checkpoint='https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/'
        'dynamic_dwnet_base_224.pth'
    ),
)
