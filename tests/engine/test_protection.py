"""The hooks get into any config, and are found by their names alone."""

import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.hooks import CheckpointHook

from acmix_mm.engine import protect

NAMES = ['ReproducibilityHook', 'StopAtNonFiniteLossHook', 'SummaryHook', 'PreemptionHook']


def protected(**settings) -> Config:
    cfg = Config(settings)
    protect(cfg)
    return cfg


@pytest.mark.parametrize('name', ['CheckpointHook', 'mmengine.CheckpointHook', CheckpointHook])
def test_checkpoint_hook_keeps_its_arguments(name):
    saving = {'type': name, 'interval': 3, 'save_best': 'mIoU'}
    cfg = protected(default_hooks={'checkpoint': saving, 'timer': None})
    assert cfg.default_hooks.checkpoint == {**saving, 'type': 'SafeCheckpointHook'}
    assert cfg.default_hooks.timer is None
    assert [hook.type for hook in cfg.custom_hooks] == NAMES


def test_config_without_hooks():
    cfg = protected()
    assert cfg.default_hooks.checkpoint == {'type': 'SafeCheckpointHook', 'interval': 1}
    assert [hook.type for hook in cfg.custom_hooks] == NAMES
    assert cfg.custom_imports.imports == ['acmix_mm']


def test_what_a_config_has_is_kept():
    own = {'type': 'StopAtNonFiniteLossHook', 'patience': 5}
    imports = {'imports': ['acmix_mm', 'mine'], 'allow_failed_imports': True}
    cfg = protected(
        default_hooks={'checkpoint': {'type': 'MyHook'}},
        custom_hooks=[{'type': 'EMAHook'}, own],
        custom_imports=imports,
    )
    assert cfg.default_hooks.checkpoint == {'type': 'MyHook'}
    assert cfg.custom_hooks[:2] == [{'type': 'EMAHook'}, own]
    assert [h.type for h in cfg.custom_hooks[2:]] == [
        'ReproducibilityHook', 'SummaryHook', 'PreemptionHook',
    ]  # fmt: skip
    assert cfg.custom_imports == imports
    once = cfg.pretty_text
    protect(cfg)
    assert cfg.pretty_text == once


def test_no_checkpoints_are_wanted():
    assert protected(default_hooks={'checkpoint': None}).default_hooks.checkpoint is None


def test_other_imports_stay():
    cfg = protected(custom_imports={'imports': 'mine'})
    assert cfg.custom_imports.imports == ['mine', 'acmix_mm']


def test_registered_by_importing_the_package():
    """In all scopes, and nothing of the engine is imported before one is built."""
    code = f"""
import sys, acmix_mm, mmdet.registry, mmseg.registry, mmengine.registry
assert 'acmix_mm.engine' not in sys.modules
for package in (mmdet, mmseg, mmengine):
    for name in {['SafeCheckpointHook', 'PacedLoggerHook', *NAMES]}:
        assert type(package.registry.HOOKS.build(dict(type=name))).__name__ == name
"""
    subprocess.run([sys.executable, '-c', code], check=True)
