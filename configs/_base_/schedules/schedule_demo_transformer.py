# As schedule_demo.py, at a rate that transformers bear, for more epochs, and without weight decay
# on norms, position embeddings and rates.
_base_ = './schedule_demo.py'
train_cfg = dict(max_epochs=5, val_interval=5)
optim_wrapper = dict(
    optimizer=dict(lr=2e-3),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            name: dict(decay_mult=0.0)
            for name in ('pos_embed', 'relative_position_bias_table', 'rate1', 'rate2')
        },
    ),
)
param_scheduler = [
    dict(_base_.param_scheduler[0], end=100),
    dict(_base_.param_scheduler[1], end=5, T_max=5),
]
