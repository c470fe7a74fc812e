# What the heads of small segmentors on scene digits share. By default conv_seg starts at a tenth of
# this standard deviation, so near equality of all classes that training from random weights stays
# there for thousands of iterations.
demo_head = dict(
    channels=64,
    dropout_ratio=0.0,
    num_classes=11,
    norm_cfg=dict(type='BN'),
    init_cfg=dict(type='Normal', std=0.1, override=dict(name='conv_seg')),
)
