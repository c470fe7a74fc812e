# Swin-ACmix-T from plain Swin's published ImageNet weights (swin_tiny_patch4_window7_224.pth): at
# the start of training the attention path counts alone.
backbone = dict(
    type='ACmixSwinTransformer',
    embed_dims=96,
    depths=[2, 2, 6, 2],
    num_heads=[3, 6, 12, 24],
    window_size=7,
    drop_path_rate=0.2,
    patch_norm=True,
    warm_start=True,
    convert_weights=True,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/swin_tiny_patch4_window7_224.pth'),
)
channels = [96, 192, 384, 768]
