"""Batch norms made from a config."""

from torch import nn

BATCH_NORMS = {'BN': nn.BatchNorm2d, 'BN2d': nn.BatchNorm2d, 'SyncBN': nn.SyncBatchNorm}


def build_batch_norm(norm_cfg: dict | None, channels: int) -> nn.Module:
    """A batch norm from its config, as mmcv's ``build_norm_layer`` makes it, with torch alone.

    Args:
        norm_cfg (dict | None): ``type`` (one of :data:`BATCH_NORMS`, by name or class),
            ``requires_grad`` of the parameters (default: True), and arguments of the class. None is
            ``dict(type='BN')``.
        channels (int): Channels.

    Raises:
        ValueError: If it is of no batch norm.
    """
    norm_cfg = {'type': 'BN'} if norm_cfg is None else norm_cfg
    kind = norm_cfg.get('type') if isinstance(norm_cfg, dict) else None
    kind = BATCH_NORMS.get(kind, kind)
    if kind not in BATCH_NORMS.values():
        raise ValueError(
            f'norm_cfg must be of a batch norm, a dict with type {", ".join(BATCH_NORMS)}, got '
            f'{norm_cfg!r}'
        )
    options = {key: value for key, value in norm_cfg.items() if key != 'type'}
    requires_grad = options.pop('requires_grad', True)
    return kind(channels, **options).requires_grad_(requires_grad)
