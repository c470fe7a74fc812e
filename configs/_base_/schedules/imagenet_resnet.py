# ACmix (CVPR 2022), appendix B, for ResNet and SAN: 100 epochs, 256 images a step, SGD, a cosine
# from 0.1, which ends at zero.
max_epochs = 100
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, end=max_epochs)]
# The batch size that the learning rate belongs to: 8 GPUs with 32 images.
auto_scale_lr = dict(enable=False, base_batch_size=256)
