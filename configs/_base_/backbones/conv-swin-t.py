# The paper's control Conv-Swin, convolution in place of window attention: the convolution path
# alone, on maps that are not shifted, is one 3x3 convolution, factorised into 1x1, fc and grouped
# 3x3. It needs ImageNet weights of its own (configs/imagenet); plain Swin's are of attention.
_base_ = './acmix-swin-t.py'
backbone = dict(
    mix='conv',
    conv_on_shifted=False,
    warm_start=False,
    convert_weights=False,
    init_cfg=dict(checkpoint='checkpoints/conv-swin-t_in1k.pth', prefix='backbone.'),
)
