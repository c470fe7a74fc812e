# mmdet's ResNet-50 from torchvision's ImageNet weights, for detection: stem and first stage frozen,
# norms keep their statistics.
backbone = dict(
    type='mmdet.ResNet',
    depth=50,
    frozen_stages=1,
    norm_eval=True,
    init_cfg=dict(
        type='Pretrained', checkpoint='https://download.pytorch.org/models/resnet50-0676ba61.pth'
    ),
)
channels = [256, 512, 1024, 2048]
