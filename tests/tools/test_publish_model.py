"""A published checkpoint: what is in it, its name."""

import hashlib
import re
from pathlib import Path

import numpy as np
import publish_model
import pytest
import torch
from mmengine.logging import MessageHub

from acmix_mm.checkpoints import make_checkpoints_loadable

META = {'epoch': 4, 'cfg': 'model = dict()', 'dataset_meta': {'classes': ('cat', 'dog')}}


def trained() -> dict:
    """As mmengine's Runner writes it."""
    make_checkpoints_loadable()
    hub = MessageHub('test_publish_model')
    hub.update_scalar('train/loss', 1.5)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return {
        'meta': {**META, 'hook_msgs': {'last_ckpt': 'a/b.pth'}, 'seed': np.float64(3)},
        'state_dict': {'backbone.a': torch.randn(3), 'head.n': torch.tensor(7)},
        'ema_state_dict': {'module.backbone.a': torch.zeros(3)},
        'message_hub': hub.state_dict(),
        'optimizer': optimizer.state_dict(),
        'param_schedulers': [{'last_step': 3}],
    }


def publish(state: dict, tmp_path: Path, out: str = 'out') -> list[Path]:
    torch.save(state, tmp_path / 'in.pth')
    publish_model.main([str(tmp_path / 'in.pth'), str(tmp_path / out)])
    return list(tmp_path.glob('out*'))


@pytest.mark.parametrize('out', ['out', 'out.pth'])
def test_weights_and_plain_meta_alone(out, tmp_path, capsys):
    state = trained()
    (file,) = publish(state, tmp_path, out)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.name == f'out-{digest[:8]}.pth'
    torch.serialization.clear_safe_globals()
    published = torch.load(file, weights_only=True)
    assert published.keys() == {'meta', 'state_dict'}
    assert published['meta'] == META
    assert published['state_dict'].keys() == state['state_dict'].keys()
    for name, value in state['state_dict'].items():
        assert torch.equal(published['state_dict'][name], value)
    text = capsys.readouterr().out
    (left_out,) = re.findall(r'left out: +(.*)', text)
    assert set(left_out.split(', ')) == {
        'ema_state_dict', 'message_hub', 'optimizer', 'param_schedulers', 'meta.hook_msgs',
        'meta.seed',
    }  # fmt: skip
    assert f'checkpoint: {file}' in text


def test_bare_weights(tmp_path, capsys):
    (file,) = publish({'a': torch.ones(1), 'b': torch.zeros(1)}, tmp_path)
    assert torch.load(file) == {'meta': {}, 'state_dict': {'a': torch.ones(1), 'b': torch.zeros(1)}}
    assert re.search(r'left out: +nothing', capsys.readouterr().out)


def test_never_overwrites(tmp_path):
    state = {'state_dict': {'a': torch.ones(2)}}
    (file,) = publish(state, tmp_path)
    with pytest.raises(SystemExit, match=f'{file.name} exists already'):
        publish(state, tmp_path)
    with pytest.raises(SystemExit, match=r'folder .*none does not exist'):
        publish(state, tmp_path, 'none/x')
    with pytest.raises(SystemExit, match='holds no weights'):
        publish({'state_dict': {}}, tmp_path)
