"""Registered hooks for training that loses no work, and goes on from where it was.

Each works in anyone's config, with ``custom_imports = dict(imports=['acmix_mm'])``;
:func:`protect` puts all of them into a config, as tools/train.py does. :class:`PathBiasHook` has
nothing to do with that: it records how operators weigh their two paths.
:class:`PacedLoggerHook` and :class:`SummaryHook` say how long training takes and what came of it.
"""

from .checkpoint_hook import SafeCheckpointHook, WholeFileBackend
from .cpu_amp import CPUAmpOptimWrapper, use_bfloat16
from .logger_hook import PacedLoggerHook
from .non_finite_loss_hook import StopAtNonFiniteLossHook
from .path_bias_hook import PathBiasHook
from .preemption_hook import PreemptionHook
from .protection import protect
from .reproducibility_hook import ReproducibilityHook
from .summary_hook import SummaryHook
from .work_dir import newest_checkpoint, set_aside

__all__ = [
    'CPUAmpOptimWrapper',
    'PacedLoggerHook',
    'PathBiasHook',
    'PreemptionHook',
    'ReproducibilityHook',
    'SafeCheckpointHook',
    'StopAtNonFiniteLossHook',
    'SummaryHook',
    'WholeFileBackend',
    'newest_checkpoint',
    'protect',
    'set_aside',
    'use_bfloat16',
]
