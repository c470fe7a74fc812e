# DWNet-T with kernels predicted at each position. Its authors publish no weights of it, so it
# starts from its own (configs/imagenet).
_base_ = './dwnet-t.py'
backbone = dict(
    dynamic='inhomogeneous',
    convert_weights=False,
    init_cfg=dict(checkpoint='checkpoints/i-dynamic-dwnet-t_in1k.pth', prefix='backbone.'),
)
