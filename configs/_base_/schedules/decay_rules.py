# What weight decay leaves alone: norms, position embeddings and biases, the two rates of a mixed
# operator.
paramwise_cfg = dict(
    norm_decay_mult=0.0,
    custom_keys={
        name: dict(decay_mult=0.0)
        for name in ('pos_embed', 'relative_position_bias_table', 'rate1', 'rate2')
    },
)
