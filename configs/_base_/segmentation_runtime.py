# Runtime of segmentors, trained by iterations. Of the checkpoints the last two and the best are
# kept.
_base_ = './default_runtime.py'
default_scope = 'mmseg'

default_hooks = dict(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=8000, max_keep_ckpts=2, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'),
)
visualizer = dict(type='SegmentationVisualizer')
log_processor = dict(by_epoch=False)
# For tools/test.py --tta, with the data set's tta_pipeline.
tta_model = dict(type='SegTTAModel')
