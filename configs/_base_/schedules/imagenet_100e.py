# ACmix (CVPR 2022), appendix B, for ResNet and SAN, as SAN's release: 100 epochs, 256 images a
# step, SGD, a cosine from 0.1 to zero in steps of an epoch.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=100, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=100, T_max=100)]
# The batch size that the learning rate belongs to: 8 GPUs with 32 images.
auto_scale_lr = dict(enable=False, base_batch_size=256)
