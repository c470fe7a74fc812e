# DWNet-T with kernels predicted from the whole image, by its release.
_base_ = './dwnet-t_8xb128-300e_in1k.py'
model = dict(backbone=dict(dynamic='homogeneous'))
