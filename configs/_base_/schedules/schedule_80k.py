# MMSegmentation's 80k iterations of SGD for ResNets, 16 images a step.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80_000, val_interval=8000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=1e-4, by_epoch=False, begin=0, end=80_000)
]
# The batch size that the learning rate belongs to: 8 GPUs with 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
