# DWNet-T with kernels predicted at each position, by its release (which leaves AMP out here).
_base_ = './dwnet-t_8xb128-300e_in1k.py'
model = dict(backbone=dict(dynamic='inhomogeneous'))
