# SAN-ACmix 19 from plain SAN's ImageNet weights: at the start of training the attention path counts
# alone.
_base_ = './san19.py'
backbone = dict(type='ACmixSAN', warm_start=True)
