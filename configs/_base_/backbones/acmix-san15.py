# SAN-ACmix 15 from plain SAN's ImageNet weights: at the start of training the attention path counts
# alone.
_base_ = './san15.py'
backbone = dict(type='ACmixSAN', warm_start=True)
