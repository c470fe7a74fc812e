# Cascade Mask R-CNN: Cascade R-CNN with a mask head in each stage.
_base_ = ['./cascade-rcnn_fpn.py', './mask_branch.py']
model = dict(
    data_preprocessor=dict(pad_mask=True),
    roi_head=dict(
        mask_roi_extractor=_base_.pop('mask_roi_extractor'), mask_head=_base_.pop('mask_head')
    ),
    train_cfg=dict(rcnn=[dict(stage, mask_size=28) for stage in _base_.model.train_cfg.rcnn]),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
