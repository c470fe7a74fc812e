# Kernel groups (ACmix, section 4.3): one, so that all outputs of a head position share a kernel.
_base_ = '../demo/retinanet_acmix-r26_fpn_scene-digits.py'
model = dict(backbone=dict(kernel_groups=1))
