# Runtime of image classifiers: the best checkpoint and the last two are kept.
_base_ = './default_runtime.py'
default_scope = 'mmpretrain'

default_hooks = dict(
    checkpoint=dict(max_keep_ckpts=2, save_best='accuracy/top1'),
    visualization=dict(type='VisualizationHook'),
)
visualizer = dict(type='UniversalVisualizer')
