# What Swin's release exempts from weight decay, by name; norms called otherwise, such as the batch
# norms of heads, are not exempt. And the two rates of a mixed operator: ACmix's release exempts all
# vectors.
paramwise_cfg = dict(
    custom_keys={
        name: dict(decay_mult=0.0)
        for name in ('absolute_pos_embed', 'relative_position_bias_table', 'norm', 'rate1', 'rate2')
    }
)
