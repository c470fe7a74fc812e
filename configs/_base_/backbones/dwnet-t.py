# DWNet-T from its authors' ImageNet weights; batch norms are trained over all images of a step, as
# in their release. A recipe adds the drop path rate.
backbone = dict(
    type='DWNet',
    arch='tiny',
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    convert_weights=True,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/Atten4Vis/DemystifyLocalViT/releases/download/prerelease/'
        'dwnet_tiny_224.pth',
    ),
)
channels = [96, 192, 384, 768]
