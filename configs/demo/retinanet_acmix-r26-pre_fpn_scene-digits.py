# The same, from the classifier that make demo TASK=classification trains.
_base_ = './retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(
    backbone=dict(
        init_cfg=dict(
            _delete_=True,
            type='Pretrained',
            checkpoint='checkpoints/acmix-r26_single-digits.pth',
            prefix='backbone.',
        )
    )
)
