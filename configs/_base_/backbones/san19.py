# SAN 19 (patchwise) from its authors' ImageNet weights: stem and first two stages frozen, as in
# ResNets. Their release is a folder whose files are all called model_best.pth; docs/recipes.md says
# what to rename.
backbone = dict(
    type='SAN',
    depth=19,
    frozen_stages=1,
    norm_eval=True,
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/san19_patchwise.pth'),
)
channels = [256, 512, 1024, 2048]
