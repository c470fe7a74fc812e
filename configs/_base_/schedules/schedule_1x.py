# ACmix (CVPR 2022), appendix: 12 epochs, 16 images a step, SGD at 0.01 with a linear warm-up over
# 500 iterations, times 0.1 after epochs 8 and 11.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=12, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
# The batch size that the learning rate belongs to: 8 GPUs with 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
