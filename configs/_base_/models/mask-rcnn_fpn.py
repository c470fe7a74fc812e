# Mask R-CNN: Faster R-CNN with a mask head.
_base_ = ['./faster-rcnn_fpn.py', './mask_branch.py']
model = dict(
    type='MaskRCNN',
    data_preprocessor=dict(pad_mask=True),
    roi_head=dict(
        mask_roi_extractor=_base_.pop('mask_roi_extractor'), mask_head=_base_.pop('mask_head')
    ),
    train_cfg=dict(rcnn=dict(assigner=dict(match_low_quality=True), mask_size=28)),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
