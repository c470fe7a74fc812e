"""Checkpoints that are whole or absent, the old one of which goes last."""

from collections import deque
from collections.abc import Collection
from pathlib import Path

import torch
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from ..files import remove_parts, whole_file
from .work_dir import INTERRUPTED, LAST, is_remote, newest_checkpoint

BACKEND = 'whole_file'
MAIN_METRICS = ('bbox_mAP', 'mAP', 'mIoU', 'accuracy/top1')  # ends of their names


class WholeFileBackend(LocalBackend):
    """mmengine's backend of local files, each of which is whole or absent.

    As ``backend_args=dict(backend='whole_file')`` it serves whatever of OpenMMLab writes files.
    """

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(filepath) as part:
            super().put(obj, part)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        self.put(obj.encode(encoding), filepath)


register_backend(BACKEND, WholeFileBackend, force=True)


class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, with its arguments, which loses nothing.

    * A checkpoint is written beside its place, which it takes when it is whole, and so is
      ``last_checkpoint``. Only then those are removed that are not to be kept any longer.
    * With ``resume=True`` and no ``load_from``, training goes on from the newest checkpoint that is
      whole of its own work directory, wherever that has been moved or copied to.
    * Weights that were finite and are not any more are never saved.
    * ``save_best='auto'`` is by box AP, any AP, mean IoU or top-1 accuracy, the first of these that
      there is; mmengine takes the first metric, of segmentors pixel accuracy, and of detectors
      evaluated by classes that of one class.
    * Nothing in a checkpoint is executed: mmengine's Runner would run the text ``meta['config']``.

    What other processes or machines are to read, such as ``s3://...``, is written as before.
    """

    _finite: Collection[str] = ()  # names of what was when training began

    def before_run(self, runner: Runner) -> None:
        if runner._resume and runner._load_from is None:
            found = [None]
            if is_main_process():
                found = [newest_checkpoint(runner.work_dir, self.out_dir)]
            broadcast_object_list(found)
            runner._load_from = found[0]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint.get('meta', {}).pop('config', None)

    def before_train(self, runner: Runner) -> None:
        local = not is_remote(self.out_dir or runner.work_dir)
        if local and self.backend_args is None and self.file_client_args is None:
            self.backend_args = {'backend': BACKEND}
        super().before_train(runner)
        if local and is_main_process():
            remove_parts(self.out_dir)
        # The work directory may have been copied: those of the original are not ours to remove.
        self._best = {key: self._path(Path(path).name) for key, path in self._best.items() if path}
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._finite = {name for name, value in model.state_dict().items() if is_finite(value)}

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        for name, value in checkpoint['state_dict'].items():
            if name in self._finite and not is_finite(value):
                raise FloatingPointError(
                    f'training stopped before a checkpoint was saved after {runner.iter} '
                    f'iterations: weight {name} is not finite any more; '
                    f'{last_checkpoint(runner)}'
                )

    def save_interrupted(self, runner: Runner, epoch: int, iteration: int, **state) -> None:
        """Save a checkpoint outside of the interval; the next one takes its place.

        Args:
            runner (Runner): The runner of the training process.
            epoch (int): Whole epochs that have been trained.
            iteration (int): Iterations that have been trained.
            state: What the checkpoint says in its ``meta``, too.
        """
        meta = {'epoch': epoch, 'iter': iteration, **state}
        name = INTERRUPTED.format(iteration)
        self._save(runner, name, meta, save_optimizer=True, save_param_scheduler=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = []
        if self.max_keep_ckpts > 0:
            kept = [*(i for i in self.keep_ckpt_ids if i != step), step]
            # With the outdated: if this process ends before, the next one removes them.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
            outdated = kept[: -self.max_keep_ckpts]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
        self._save(
            runner,
            self.filename_tmpl.format(step),
            meta,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
        )
        for step in outdated:
            self._remove(self._path(self.filename_tmpl.format(step)))

    def _save(self, runner: Runner, name: str, meta: dict, **what: bool) -> None:
        self.last_ckpt = self._path(name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **what,
            **self.args,
        )
        if is_main_process():
            WholeFileBackend().put_text(self.last_ckpt, Path(runner.work_dir, LAST))
            for other in self.file_backend.list_dir_or_file(self.out_dir, list_dir=False):
                if Path(other).match(INTERRUPTED.format('*')) and other != name:
                    self._remove(self._path(other))

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.save_best and 'auto' in self.key_indicators:
            names = [name for end in MAIN_METRICS for name in metrics if name.endswith(end)]
            self._init_rule(self.rules, (names or [*metrics])[:1])
        before, self._best = self._best, {}
        super()._save_best_checkpoint(runner, metrics)
        for key, path in before.items():
            new = self._best.get(key)
            if new is None:
                self._best = {**self._best, key: path}
            elif path and path != new:
                self._remove(path)

    @property
    def _best(self) -> dict[str, str | None]:
        """The best checkpoints by their metrics; the base class has two places for them."""
        if not self.save_best:
            return {}
        if len(self.key_indicators) == 1:
            return {'': self.best_ckpt_path}
        return self.best_ckpt_path_dict

    @_best.setter
    def _best(self, paths: dict[str, str | None]) -> None:
        if not self.save_best:
            return
        if len(self.key_indicators) == 1:
            self.best_ckpt_path = paths.get('')
        else:
            self.best_ckpt_path_dict = {key: paths.get(key) for key in self.key_indicators}

    def _path(self, name: str) -> str:
        return self.file_backend.join_path(self.out_dir, name)

    def _remove(self, path: str) -> None:
        if not is_main_process():
            return
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif self.file_backend.isdir(path):  # as DeepSpeed saves them
            self.file_backend.rmtree(path)


def is_finite(value: object) -> bool:
    """Whether an entry of a state dict is a tensor of finite values."""
    return torch.is_tensor(value) and bool(value.isfinite().all())


def last_checkpoint(runner: Runner) -> str:
    """For messages: which checkpoint there is."""
    file = Path(runner.work_dir, LAST)
    return f'the last checkpoint is {file.read_text()}' if file.exists() else 'none has been saved'
