# The same with RTMDet's own backbone, CSPNeXt as in rtmdet_tiny, of which three stages serve.
_base_ = './rtmdet_acmix-r26_scene-digits.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='CSPNeXt',
        # Channels in and out, blocks, shortcuts, pyramid pooling.
        arch_ovewrite=[
            [64, 128, 3, True, False],
            [128, 256, 6, True, False],
            [256, 512, 6, False, True],
        ],
        deepen_factor=0.167,
        widen_factor=0.375,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='SiLU', inplace=True),
    ),
    neck=dict(in_channels=[48, 96, 192]),
)
