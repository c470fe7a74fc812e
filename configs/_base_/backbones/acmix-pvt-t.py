# PVT-ACmix-T from plain PVT's published ImageNet weights (pvt_tiny.pth): at the start of training
# the attention path counts alone.
backbone = dict(
    type='ACmixPyramidVisionTransformer',
    num_layers=[2, 2, 2, 2],
    warm_start=True,
    convert_weights=True,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/pvt_tiny.pth'),
)
channels = [64, 128, 320, 512]
