# DWNet-B with kernels predicted from the whole image, by its release.
_base_ = './dwnet-b_16xb64-300e_in1k.py'
model = dict(backbone=dict(dynamic='homogeneous'))
