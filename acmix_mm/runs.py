"""Training and evaluation of a config, as tools/train.py and tools/test.py do them."""

import contextlib
import copy
import functools
import os
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.runner import Runner

from .checkpoints import make_checkpoints_loadable, read_checkpoint
from .command_line import join_processes, keep_freed_memory, once
from .data_check import check_data
from .engine import newest_checkpoint, protect, set_aside, use_bfloat16
from .files import claim, naming
from .onnx_model import is_onnx, use_onnx_file
from .weights import build, check_classes, check_fit, check_starts, resolve_weights


def _copy(cfg: Config) -> Config:
    if cfg.get('work_dir') is None:
        raise ValueError('work_dir of the config must be a folder for logs and results, got None')
    return copy.deepcopy(cfg)


# Training.


def train(cfg: Config) -> Runner:
    """Train the model of a config, with the hooks of :func:`~acmix_mm.engine.protect`.

    First it is checked that the model can start as the config says, and that its data can be
    trained and validated on. The work directory belongs to this process while it trains;
    checkpoints and summary of an earlier run in it are moved to ``before_TIME``, unless training
    goes on from them. To be called in every process of a distributed job, which ``cfg.launcher``
    has started.

    Args:
        cfg (Config): For mmengine's Runner, with a ``work_dir``; it stays as it is.
            ``resume='auto'`` goes on from the newest whole checkpoint of the work directory, if
            there is any.

    Returns:
        Runner: That has trained.

    Raises:
        ValueError: In one line, if training cannot start.
        FloatingPointError: If a loss or a weight is not finite any more.
    """
    cfg = _copy(cfg)
    make_checkpoints_loadable()
    join_processes(cfg)
    with contextlib.ExitStack() as claimed:
        cfg = once(functools.partial(_prepare_training, claimed=claimed), cfg)
        keep_freed_memory()
        protect(cfg)
        runner = Runner.from_cfg(cfg)
        runner.train()
    return runner


def _prepare_training(cfg: Config, claimed: contextlib.ExitStack) -> None:
    """Read what training starts from, and claim the work directory.

    For one process of a job; what it changes in the config, all get.
    """
    resolve_weights(cfg)
    saving = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    out_dir, template = saving.get('out_dir'), saving.get('filename_tmpl')
    restarted = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # after a process ended
    search = cfg.get('resume') == 'auto' or (cfg.get('resume') and cfg.get('load_from') is None)
    if search or restarted:
        try:
            newest = newest_checkpoint(cfg.work_dir, out_dir)
        except ValueError as error:
            raise ValueError(f'--resume: {error}') from None
        if newest is not None:
            cfg.resume, cfg.load_from = True, newest
            print(f'training goes on from {newest}')
        elif search:
            cfg.resume = False
            print(f'training begins: {cfg.work_dir} has no checkpoint to go on from')
    if get_device() == 'cpu' and use_bfloat16(cfg):
        print('mixed precision on a CPU: forward passes in bfloat16, no loss scale')
    check_starts(cfg)
    check_data(cfg, ['train', 'val'])
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    claimed.enter_context(claim(cfg.work_dir))
    start = cfg.load_from if cfg.get('resume') else None
    moved = set_aside(cfg.work_dir, start, out_dir, template)
    for old, new in moved.items():
        print(f'of an earlier run: {old} is {new} now')
        if cfg.get('load_from') and Path(cfg.load_from).absolute() == old.absolute():
            cfg.load_from = str(new)


# Evaluation.


def evaluate(cfg: Config, checkpoint: str, tta: bool = False) -> dict[str, float]:
    """The metrics of a checkpoint on a config's test data; see :func:`prepare_test`."""
    runner = prepare_test(cfg, checkpoint, tta)
    with naming(runner.work_dir):
        return runner.test()


def prepare_test(cfg: Config, checkpoint: str, tta: bool = False) -> Runner:
    """A Runner whose ``test()`` evaluates a checkpoint.

    First it is checked that the checkpoint has just the model's weights, and that the test data can
    be evaluated on. To be called in every process of a distributed job, which ``cfg.launcher`` has
    started.

    Args:
        cfg (Config): For mmengine's Runner, with a ``work_dir``; it stays as it is.
        checkpoint (str): A file or URL; or an ONNX file of tools/deploy/export_model.py, which
            takes the model's place.
        tta (bool): Test-time augmentation with the config's ``tta_model`` and ``tta_pipeline``. A
            detector's default is to merge the boxes of the image and of its mirror image; masks are
            left out. Default: False.

    Raises:
        ValueError: In one line, if the checkpoint or the data cannot serve, or if the config has no
            test-time augmentation.
    """
    cfg = _copy(cfg)
    cfg.load_from = checkpoint
    make_checkpoints_loadable()
    join_processes(cfg)
    cfg = once(functools.partial(_prepare_test, tta=tta), cfg)
    keep_freed_memory()
    Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
    return Runner.from_cfg(cfg)


def _prepare_test(cfg: Config, tta: bool) -> None:
    """Check checkpoint and data, and set what changes the model afterwards.

    For one process of a job; what it changes in the config, all get.
    """
    if is_onnx(cfg.load_from):
        if tta:
            raise ValueError(f'--tta: {cfg.load_from} is an ONNX file, which has its own pipeline')
        meta = use_onnx_file(cfg, cfg.load_from)
        check_classes(cfg, 'test', {'meta': {'dataset_meta': meta}}, cfg.load_from)
        cfg.load_from = None
        check_data(cfg, ['test'])
        return
    weights = read_checkpoint(cfg.load_from)
    check_fit(build(cfg), weights, cfg.load_from, cfg.filename or '(without a file)')
    check_classes(cfg, 'test', weights, cfg.load_from)
    if tta:
        augment(cfg)
    check_data(cfg, ['test'])


def augment(cfg: Config) -> None:
    """Set test-time augmentation in a config, in place; see :func:`prepare_test`."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # wrappers
        dataset = dataset.dataset
    if cfg.get('default_scope') == 'mmdet':
        # mmdet's defaults, but with the image itself first: what is kept beside boxes is its.
        nms = {'type': 'nms', 'iou_threshold': 0.5}
        tta_cfg = {'nms': nms, 'max_per_img': 100}
        cfg.setdefault('tta_model', {'type': 'DetTTAModel', 'tta_cfg': tta_cfg})
        *transforms, pack = copy.deepcopy(dataset.pipeline)
        if 'meta_keys' in pack:
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        flips = [{'type': 'RandomFlip', 'prob': prob} for prob in (0.0, 1.0)]
        transforms.append({'type': 'TestTimeAug', 'transforms': [flips, [pack]]})
        cfg.setdefault('tta_pipeline', transforms)
        _leave_out_masks(cfg)
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise ValueError(f'--tta: {cfg.filename} has no {key}')
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def _leave_out_masks(cfg: Config) -> None:
    """Take out a detector's mask branch, which mmdet's test-time augmentation cannot merge."""
    roi_head = cfg.model.get('roi_head', {})
    if roi_head.pop('mask_head', None) is None:
        return
    roi_head.pop('mask_roi_extractor', None)
    for evaluator in evaluators_of(cfg):
        if evaluator.type == 'CocoMetric':
            evaluator.metric = 'bbox'


def evaluators_of(cfg: Config) -> list[ConfigDict]:
    """The metrics of a config's test."""
    evaluator = cfg.test_evaluator
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]
