"""Configs with a fault end in one line before work starts, and leave nothing."""

import pytest
import train
from refusals import refusal

from acmix_mm.command_line import load_config
from acmix_mm.openmmlab import TRAINING_HOOKS

DETECTOR = 'configs/demo/retinanet_acmix-r26_fpn_scene-digits.py'
CASCADE = 'configs/acmix_swin/cascade-mask-rcnn_acmix-swin-t_fpn_8xb2-3x_coco.py'
SEGMENTOR = 'configs/demo/acmix-swin_upernet_scene-digits.py'


# What a file says that inherits from a config, and what the message has to name.
FILES = {
    'top-level key': (
        DETECTOR,
        'train_dataloadr = dict(batch_size=2)',
        'train_dataloadr: nothing reads this key; did you mean train_dataloader?',
    ),
    'wrapper': (
        DETECTOR,
        "optim_wraper = dict(type='OptimWrapper')",
        'did you mean optim_wrapper?',
    ),
    'hook': (DETECTOR, 'default_hook = dict()', 'did you mean default_hooks?'),
    'argument of a hook of ours': (
        DETECTOR,
        "custom_hooks = [dict(type='PathBiasHook', intervall=5)]",
        'custom_hooks.0.intervall: PathBiasHook has no argument intervall; did you mean interval?',
    ),
    'argument of a backbone': (
        DETECTOR,
        'model = dict(backbone=dict(depht=38))',
        'model.backbone.depht: ACmixResNet has no argument depht; did you '
        'mean depth?; it has depth',
    ),
    'argument of a head': (
        DETECTOR,
        'model = dict(bbox_head=dict(num_clases=10))',
        'model.bbox_head.num_clases: RetinaHead has no argument num_clases; did '
        'you mean num_classes?',
    ),
    'argument of a neck': (
        DETECTOR,
        'model = dict(neck=dict(out_chanels=64))',
        'model.neck.out_chanels: FPN has no argument',
    ),
    'argument of a model': (
        DETECTOR,
        'model = dict(bakbone=dict())',
        'model.bakbone: RetinaNet has no argument bakbone; did you mean backbone',
    ),
    'type of a backbone': (
        DETECTOR,
        "model = dict(backbone=dict(type='ACmixResnet'))",
        "model.backbone.type: no class 'ACmixResnet' is registered for it; did "
        'you mean ACmixResNet?',
    ),
    'type of a model': (DETECTOR, "model = dict(type='RetinNet')", 'did you mean RetinaNet?'),
    'type of a loss': (
        CASCADE,
        "model = dict(rpn_head=dict(loss_bbox=dict(type='L2Los')))",
        "model.rpn_head.loss_bbox.type: no class 'L2Los'",
    ),
    'type of a norm': (
        DETECTOR,
        "model = dict(backbone=dict(norm_cfg=dict(type='BatchNom')))",
        'BatchNom',
    ),
    'type of an anchor': (
        DETECTOR,
        "model = dict(bbox_head=dict(anchor_generator=dict(type='Anch')))",
        "model.bbox_head.anchor_generator.type: no class 'Anch'",
    ),
    'depth as a text': (
        DETECTOR,
        "model = dict(backbone=dict(depth='50'))",
        'model.backbone.depth',
    ),
    'depth that there is not': (
        DETECTOR,
        'model = dict(backbone=dict(depth=27))',
        'model.backbone: ACmixResNet',
    ),
    'mix': (DETECTOR, "model = dict(backbone=dict(mix='sume'))", 'mix'),
    'classes below 0': (
        DETECTOR,
        'model = dict(bbox_head=dict(num_classes=-1))',
        'model.bbox_head.num_classes must be a positive integer, got -1',
    ),
    'half a class': (
        DETECTOR,
        'model = dict(bbox_head=dict(num_classes=2.5))',
        'model.bbox_head.num_classes must be a positive integer, got 2.5',
    ),
    'classes of a detector': (
        DETECTOR,
        'model = dict(bbox_head=dict(num_classes=11))',
        'model.bbox_head.num_classes is 11, but train_dataloader.dataset has 10 classes',
    ),
    'classes of a cascade': (
        CASCADE,
        'model = dict(roi_head=dict(mask_head=dict(num_classes=81)))',
        'model.roi_head.mask_head.num_classes is 81, but train_dataloader.dataset has 80 classes',
    ),
    'classes of a segmentor': (
        SEGMENTOR,
        'model = dict(decode_head=dict(num_classes=21))',
        'model.decode_head.num_classes is 21, but',
    ),
    'classes of an auxiliary head': (
        'configs/acmix_swin/acmix-swin-t_upernet_8xb2-160k_ade20k-512x512.py',
        'model = dict(auxiliary_head=dict(num_classes=21))',
        'model.auxiliary_head.num_classes is 21, but',
    ),
    'batch of 0': (
        DETECTOR,
        'train_dataloader = dict(batch_size=0)',
        'train_dataloader.batch_size must be a positive integer, got 0',
    ),
    'batch of -1': (DETECTOR, 'val_dataloader = dict(batch_size=-1)', 'val_dataloader.batch_size'),
    'batch as a text': (DETECTOR, "train_dataloader = dict(batch_size='x')", "got 'x'"),
    'workers': (
        DETECTOR,
        'train_dataloader = dict(num_workers=-1)',
        'train_dataloader.num_workers must be an integer, at least 0, got -1',
    ),
    'argument of a loader': (
        DETECTOR,
        'train_dataloader = dict(batchsize=2)',
        'train_dataloader.batchsize: DataLoader has no argument batchsize; did '
        'you mean batch_size?',
    ),
    'negative epochs': (
        DETECTOR,
        'train_cfg = dict(max_epochs=-3)',
        'train_cfg.max_epochs must be a positive integer, got -3',
    ),
    'no epochs': (DETECTOR, 'train_cfg = dict(max_epochs=0)', 'train_cfg.max_epochs must be'),
    'epochs as a text': (DETECTOR, "train_cfg = dict(max_epochs='12')", "got '12'"),
    'interval': (DETECTOR, 'train_cfg = dict(val_interval=0)', 'train_cfg.val_interval must be'),
    'argument of a loop': (
        DETECTOR,
        'train_cfg = dict(max_epoch=3)',
        'has no argument max_epoch; did you mean max_epochs?',
    ),
    'learning rate as a text': (
        DETECTOR,
        "optim_wrapper = dict(optimizer=dict(lr='abc'))",
        "optim_wrapper.optimizer.lr must be a number, at least 0, got 'abc'",
    ),
    'learning rate below 0': (
        DETECTOR,
        'optim_wrapper = dict(optimizer=dict(lr=-0.1))',
        'optim_wrapper.optimizer.lr must be a number, at least 0, got -0.1',
    ),
    'argument of an optimiser': (
        DETECTOR,
        'optim_wrapper = dict(optimizer=dict(weight_dcay=0.1))',
        'AdamW has no argument weight_dcay; did you mean weight_decay?',
    ),
    'type of an optimiser': (
        DETECTOR,
        "optim_wrapper = dict(optimizer=dict(type='Adamw'))",
        "optim_wrapper.optimizer.type: no class 'Adamw' is registered",
    ),
    'argument of a wrapper': (
        DETECTOR,
        'optim_wrapper = dict(clip_gradd=dict(max_norm=1))',
        'did you mean clip_grad?',
    ),
    'betas': (
        DETECTOR,
        'optim_wrapper = dict(optimizer=dict(betas=(0.9, 2.0)))',
        'optim_wrapper.optimizer: AdamW: ValueError: Invalid beta parameter at index 1: 2.0',
    ),
    'type of a schedule': (
        DETECTOR,
        "param_scheduler = [dict(type='MultiStep', milestones=[1])]",
        "param_scheduler.0.type: no class 'MultiStep' is registered for it; did "
        'you mean MultiStepLR?',
    ),
    'argument of a schedule': (
        DETECTOR,
        "param_scheduler = [dict(type='MultiStepLR', milestone=[8])]",
        'param_scheduler.0.milestone: MultiStepLR has no argument milestone; '
        'did you mean milestones?',
    ),
    'end before begin': (
        DETECTOR,
        "param_scheduler = [dict(type='LinearLR', begin=9, end=3)]",
        'param_scheduler.0: LinearLR: ValueError: end should be larger than begin',
    ),
    'schedule without a type': (
        DETECTOR,
        'param_scheduler = [dict(milestones=[8])]',
        'param_scheduler.0 must have a type, it has milestones',
    ),
    'type of a hook': (
        DETECTOR,
        "custom_hooks = [dict(type='EMAHok')]",
        "custom_hooks.0.type: no class 'EMAHok' is registered for it; did you mean EMAHook?",
    ),
    'argument of a hook': (
        DETECTOR,
        'default_hooks = dict(checkpoint=dict(intervall=1))',
        'default_hooks.checkpoint.intervall',
    ),
    'hook without a type': (
        DETECTOR,
        'default_hooks = dict(chekpoint=dict(interval=1))',
        'default_hooks.chekpoint must have a type, it has interval',
    ),
    'interval of a hook': (
        DETECTOR,
        "default_hooks = dict(logger=dict(interval='often'))",
        "default_hooks.logger.interval must be an integer, got 'often'",
    ),
    'type of a data set': (
        DETECTOR,
        "train_dataloader = dict(dataset=dict(type='CocoDatset'))",
        "train_dataloader.dataset.type: no class 'CocoDatset' is registered for "
        'it; did you mean CocoDataset?',
    ),
    'argument of a data set': (
        DETECTOR,
        "train_dataloader = dict(dataset=dict(anns_file='x'))",
        'CocoDataset has no argument anns_file; did you mean ann_file?',
    ),
    'type of a transform': (
        DETECTOR,
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Rezise')]))",
        "train_dataloader.dataset.pipeline.0.type: no class 'Rezise' is "
        'registered for it; did you mean Resize?',
    ),
    'argument of a transform': (
        DETECTOR,
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='RandomFlip', probb=0.5)]))",
        'train_dataloader.dataset.pipeline.0.probb: RandomFlip has no argument probb',
    ),
    'scale that is no pair': (
        DETECTOR,
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale='big')]))",
        'train_dataloader.dataset.pipeline.0.scale must be a number, a pair of them or a list of '
        "pairs, got 'big'",
    ),
    'probability': (
        DETECTOR,
        "train_dataloader = dict(dataset=dict(pipeline=[dict(type='RandomFlip', prob=1.5)]))",
        'train_dataloader.dataset.pipeline.0: RandomFlip: AssertionError',
    ),
    'type of a sampler': (
        DETECTOR,
        "train_dataloader = dict(sampler=dict(type='DefaultSamper'))",
        'did you mean DefaultSampler?',
    ),
    'argument of a metric': (
        DETECTOR,
        "val_evaluator = dict(metrics='bbox')",
        'val_evaluator.metrics: CocoMetric has no argument metrics; did you mean metric?',
    ),
    'type of a metric': (
        DETECTOR,
        "val_evaluator = dict(type='CocoMetrics')",
        'did you mean CocoMetric?',
    ),
    'heads that do not divide channels': (
        SEGMENTOR,
        'model = dict(backbone=dict(num_heads=[3, 4, 8, 16]))',
        'model.backbone',
    ),
    'out_indices': (
        DETECTOR,
        'model = dict(backbone=dict(out_indices=(0, 1, 2, 7)))',
        'model.backbone: ACmixResNet',
    ),
    'model as a text': (DETECTOR, "model = 'RetinaNet'", "model must be a dict, got 'RetinaNet'"),
    'seed': (
        DETECTOR,
        "randomness = dict(seed='zero')",
        "randomness.seed must be None or an integer, at least 0, got 'zero'",
    ),
    'level of the log': (DETECTOR, "log_level = 'LOUD'", "log_level must be 'INFO'"),
    'base batch': (
        DETECTOR,
        'auto_scale_lr = dict(base_batch_size=0)',
        'auto_scale_lr.base_batch_size must be a positive integer, got 0',
    ),
    'scope': (
        DETECTOR,
        "default_scope = 'mmdett'",
        "default_scope: no package 'mmdett' is installed",
    ),
    'import': (DETECTOR, "custom_imports = dict(imports=['acmix_mn'])", 'acmix_mn'),
    'undefined variable': (
        DETECTOR,
        'train_cfg = dict(max_epochs=epochs)',
        "config.py, line 2: NameError: name 'epochs' is not defined",
    ),
    'syntax': (DETECTOR, 'model = dict(\n', "config.py: line 2: '(' was never closed"),
    'reserved key': (DETECTOR, "filename = 'x'", 'filename is reserved for config file'),
    'base that there is not': ('configs/demo/no.py', '', 'configs/demo/no.py'),
    'kind of a base': (DETECTOR, 'model = dict(backbone=dict(type=3))', 'model.backbone'),
    'no optimiser': (DETECTOR, 'optim_wrapper = None', 'has no optim_wrapper'),
    'no model': (DETECTOR, 'model = None', 'has no model'),
    'no loop of validation': (
        DETECTOR,
        'val_cfg = None',
        'val_dataloader, val_cfg and val_evaluator go together, val_cfg is missing',
    ),
    'merged with no dict': (DETECTOR, 'train_cfg = dict(max_epochs=dict(a=1))', 'max_epochs'),
    'exception': (DETECTOR, 'raise RuntimeError("no\\nluck")', 'line 2: RuntimeError: no luck'),
    'channels that a neck is not for': (
        DETECTOR,
        "model = dict(backbone=dict(_delete_=True, type='ACmixSwinTransformer'))",
        'model.neck.in_channels is [128, 256, 512, 1024], but model.backbone '
        '(ACmixSwinTransformer) gives 4 maps with [96, 192, 384, 768] channels at strides 4, 8, 16',
    ),
    'more maps than a neck is for': (
        DETECTOR,
        'model = dict(neck=dict(in_channels=[256, 512, 1024]))',
        'model.neck.in_channels is [256, 512, 1024], but model.backbone (ACmixResNet) gives 4 maps',
    ),
    'channels that a head is not for': (
        DETECTOR,
        'model = dict(bbox_head=dict(in_channels=32))',
        'model.bbox_head.in_channels is 32, but model.neck (FPN) gives 4 maps with [64, 64, 64',
    ),
    'channels that a decode head is not for': (
        SEGMENTOR,
        'model = dict(decode_head=dict(in_channels=[32, 64, 128, 512]))',
        'model.decode_head.in_channels is [32, 64, 128, 512] of in_index [0, 1, 2, 3], but '
        'model.backbone (ACmixSwinTransformer) gives 4 maps with [32, 64, 128, 256] channels',
    ),
    'maps that a decode head does not get': (
        SEGMENTOR,
        'model = dict(backbone=dict(out_indices=(0, 1, 2)))',
        'in_index [0, 1, 2, 3], but model.backbone (ACmixSwinTransformer) gives 3 maps',
    ),
    'channels that the first of two necks is not for': (
        DETECTOR,
        "model = dict(neck=[dict(type='FPN', in_channels=[64] * 4, out_channels=64, num_outs=4),"
        " dict(type='DyHead', in_channels=64, out_channels=64)])",
        'model.neck.0.in_channels is [64, 64, 64, 64], but model.backbone',
    ),
}


# A sample of them is quick.
CASES = [pytest.param(c, marks=[pytest.mark.slow] * (i % 4 > 0)) for i, c in enumerate(FILES)]


@pytest.mark.parametrize('case', CASES)
def test_file(case, pytestconfig, tmp_path, campaign):
    base, text, expected = FILES[case]
    file, work_dir = tmp_path / 'config.py', tmp_path / 'runs'
    file.write_text(f"_base_ = '{pytestconfig.rootpath / base}'\n{text}\n")
    line = refusal(train.main, [str(file), '--work-dir', str(work_dir)])
    assert line.startswith('error: config ')
    assert len(line) < 400
    assert expected in line
    assert not work_dir.exists()
    campaign('bad configs', case)


BASES = {
    'a base with an error': (
        {'config': "_base_ = 'first.py'", 'first': 'x = 1\n\nmodel = )'},
        'first.py: line 3: unmatched',
    ),
    'a base with a name': (
        {'config': "_base_ = 'first.py'", 'first': 'x = 1\ny = z'},
        "first.py, line 2: NameError: name 'z' is not defined",
    ),
    'no base': ({'config': "_base_ = 'first.py'"}, 'first.py'),
    'a circle': (
        {'config': "_base_ = 'first.py'", 'first': "_base_ = 'config.py'"},
        'inherits from itself, by',
    ),
    'a key twice': (
        {'config': "_base_ = ['first.py', 'second.py']", 'first': 'a = 1', 'second': 'a = 2'},
        "Duplicate key is not allowed among bases. Duplicate keys: {'a'}",
    ),
    'an import of a class': (
        {'config': 'from mmdet.models import RetinNet\nmodel = dict(type=RetinNet)'},
        'RetinNet',
    ),
    'classes instead of names': (
        {
            'config': 'from mmdet.models import RetinaNet\n'
            "default_scope = 'mmdet'\nmodel = dict(type=RetinaNet, bakbone=dict())"
        },
        'model.bakbone: RetinaNet has no argument bakbone; did you mean backbone?',
    ),
    'no Python': ({'config': 'just a text'}, 'config.py: line 1: invalid syntax'),
}


@pytest.mark.parametrize('case', BASES)
def test_bases(case, tmp_path, campaign):
    files, expected = BASES[case]
    for name, text in files.items():
        (tmp_path / f'{name}.py').write_text(text)
    found = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as end:
        load_config(str(tmp_path / 'config.py'))
    assert end.value.code.startswith('error: config ')
    assert expected in end.value.code
    assert '\n' not in end.value.code
    assert {path.name for path in tmp_path.iterdir()} - found <= {'__pycache__'}
    campaign('bad configs', case)


def test_our_hooks_are_no_fault(pytestconfig, tmp_path):
    """By their names, for which something stands until they are built."""
    hooks = [{'type': name} for name in TRAINING_HOOKS]
    file = tmp_path / 'config.py'
    file.write_text(f"_base_ = '{pytestconfig.rootpath / DETECTOR}'\ncustom_hooks = {hooks}\n")
    assert load_config(str(file)).custom_hooks == hooks
