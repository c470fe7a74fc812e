# DWNet-B by its release, with 16 GPUs and 64 images each.
_base_ = './dwnet-t_8xb128-300e_in1k.py'
model = dict(backbone=dict(arch='base', drop_path_rate=0.5), head=dict(in_channels=1024))
train_dataloader = dict(batch_size=64)
