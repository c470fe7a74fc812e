# SAN-ACmix 10 from plain SAN's ImageNet weights: at the start of training the attention path counts
# alone.
_base_ = './san10.py'
backbone = dict(type='ACmixSAN', warm_start=True)
