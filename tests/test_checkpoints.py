"""Reading checkpoints: nothing runs, nothing damaged passes, and what is plain comes back."""

import http.server
import io
import os
import random
import socket
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import hostile
import numpy as np
import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn
from torch.serialization import safe_globals

from acmix_mm import checkpoints
from acmix_mm.checkpoints import (
    BadCheckpoint,
    CheckpointNotFound,
    make_checkpoints_loadable,
    read_checkpoint,
    state_dict_of,
)

NOWHERE = 'http://127.0.0.1:9/weights.pth'  # the port of a service that no machine offers


def refusal(file: object) -> str:
    """The message with which a file is refused."""
    with pytest.raises(BadCheckpoint) as caught:
        read_checkpoint(str(file))
    text = str(caught.value)
    assert '\n' not in text
    assert text.startswith('checkpoint ')
    assert str(file) in text
    return text


every_hostile_file = pytest.mark.parametrize('kind', hostile.FILES)


@every_hostile_file
def test_hostile_files_are_refused(kind, tmp_path):
    hostile.FILES[kind](tmp_path / 'x.pth', tmp_path / 'it-ran')
    assert 'cannot be read' in (text := refusal(tmp_path / 'x.pth')) or 'is refused' in text
    assert not (tmp_path / 'it-ran').exists()


@every_hostile_file
@pytest.mark.parametrize('name', ['{file}', 'openmmlab://hostile'])
def test_mmengine_refuses_them(kind, name, tmp_path, monkeypatch):
    """Also by the way that its storage schemes take, which has no loader of ours."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text('{"hostile": "x.pth"}')
    hostile.FILES[kind](tmp_path / 'x.pth', tmp_path / 'it-ran')
    make_checkpoints_loadable()
    with pytest.raises(Exception, match=r'\w'):
        CheckpointLoader.load_checkpoint(name.format(file=tmp_path / 'x.pth'))
    assert not (tmp_path / 'it-ran').exists()


@every_hostile_file
def test_their_code_would_run(kind, tmp_path, monkeypatch):
    """Where nothing refuses it: that the tests above can fail."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    hostile.FILES[kind](tmp_path / 'x.pth', tmp_path / 'it-ran')
    assert not (tmp_path / 'it-ran').exists()
    try:
        torch.load(tmp_path / 'x.pth', weights_only=False)
    except (AttributeError, RuntimeError):  # afterwards
        assert kind in ('getattr', 'plain pickle')
    assert (tmp_path / 'it-ran').exists()


def test_the_safe_loader_with_getattr_is_none(tmp_path):
    """Why OneDL's list of what is safe is put away."""
    torch.serialization.clear_safe_globals()
    hostile.FILES['getattr'](tmp_path / 'x.pth', tmp_path / 'it-ran')
    with safe_globals([getattr]), pytest.raises(AttributeError):
        torch.load(tmp_path / 'x.pth', weights_only=True)
    assert (tmp_path / 'it-ran').exists()


def test_pickled_models_are_refused(tmp_path):
    """As YOLO's programs write them."""
    torch.save({'model': nn.Linear(2, 2)}, tmp_path / 'x.pth')
    text = refusal(tmp_path / 'x.pth')
    assert 'it holds torch.nn.modules.linear.Linear, which is neither a weight nor' in text
    assert text.endswith('save the weights alone where it was written: '
                         'torch.save(model.state_dict(), FILE)')  # fmt: skip


def test_a_config_in_it_does_not_reach_the_runner(tmp_path):
    """Which executes it to resume."""
    meta = {'epoch': 1, 'config': 'import os'}
    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': meta}, tmp_path / 'x.pth')
    assert read_checkpoint(str(tmp_path / 'x.pth'))['meta'] == meta
    loaded = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))
    assert loaded['meta'] == {'epoch': 1}


@pytest.mark.parametrize('choice', ['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', None])
def test_every_load_of_the_process_is_safe(choice, tmp_path, monkeypatch):
    if choice:  # which users of mmengine set to have it resume
        monkeypatch.setenv(choice, '1')
    hostile.FILES['meta'](tmp_path / 'x.pth', tmp_path / 'it-ran')
    make_checkpoints_loadable()
    with pytest.raises(Exception, match='unsupported GLOBAL'):
        torch.load(tmp_path / 'x.pth', weights_only=False)
    assert not (tmp_path / 'it-ran').exists()


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_state_dict_of(prefix, key):
    weights = {'a.weight': torch.ones(2), 'b.modules.c': torch.zeros(1)}
    state = {f'{prefix}{name}': value for name, value in weights.items()}
    found = state_dict_of(state if key is None else {'epoch': 3, key: state})
    assert found.keys() == weights.keys()
    assert all(found[name] is weights[name] for name in weights)


@pytest.mark.parametrize('checkpoint', [None, 3, [torch.ones(1)], {}, {'state_dict': {}}])
def test_no_state_dict(checkpoint):
    assert state_dict_of(checkpoint) == {}


def test_yacs_configs_are_read_as_dicts(tmp_path, monkeypatch):
    """As in checkpoints of Swin's training program, without yacs, whose classes run no code."""

    class CfgNode(dict):
        def __setstate__(self, state):
            raise AssertionError('a method of the class ran')

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    config = CfgNode(MODEL=CfgNode(TYPE='swin', DEPTHS=[2, 2, 6, 2]))
    config.__dict__['__immutable__'] = True
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        torch.save({'model': {'a': torch.ones(1)}, 'config': config}, tmp_path / 'x.pth')
    checkpoint = read_checkpoint(str(tmp_path / 'x.pth'))
    assert checkpoint['config'] == {'MODEL': {'TYPE': 'swin', 'DEPTHS': [2, 2, 6, 2]}}
    assert state_dict_of(checkpoint) == {'a': torch.ones(1)}


def wrapped() -> nn.Module:
    """Under ``module.``, with versions of modules in its state dict."""
    return nn.DataParallel(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)))


def test_versions_of_modules_are_kept(tmp_path):
    model = wrapped()
    torch.save({'model': model.state_dict()}, tmp_path / 'x.pth')
    for weights in (
        state_dict_of(read_checkpoint(str(tmp_path / 'x.pth'))),
        CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))['state_dict'],
    ):
        expected = model.module.state_dict()
        assert weights.keys() == expected.keys()
        assert weights._metadata['1'] == expected._metadata['1'] == {'version': 2}


def again(value: object, tmp_path: Path) -> object:
    """A value beside weights, read, and the same when it is written once more."""
    for _ in range(2):
        torch.save({'a': torch.ones(1), 'value': value}, tmp_path / 'x.pth')
        value = read_checkpoint(str(tmp_path / 'x.pth'))['value']
    return value


@pytest.mark.parametrize(
    'array',
    [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.zeros((0, 4), np.float32), np.array([True, False]), np.arange(3, dtype='>i4'),
        np.array(1.5, np.float16), np.array([1 + 2j]),
    ],
)  # fmt: skip
def test_arrays_of_numbers(array, tmp_path):
    found = again(array, tmp_path)
    np.testing.assert_array_equal(found, array)
    assert (found.dtype.newbyteorder('='), found.shape) == (
        array.dtype.newbyteorder('='),
        array.shape,
    )


@pytest.mark.parametrize('number', [np.float64(1.5), np.int64(-3), np.bool_(True), np.float32(2)])
def test_numbers(number, tmp_path):
    found = again(number, tmp_path)
    assert type(found) is type(number)
    assert found == number


def test_logged_history(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1], max_length=5)
    found = again(buffer, tmp_path)
    assert found.mean() == 3
    assert found.statistics('max') == 6
    for value in range(4):
        found.update(value)
    assert found.data[0].tolist() == [6, 0, 1, 2, 3]


class Dtype:
    """A dtype of 8 bytes that takes numbers for addresses of objects."""

    def __init__(self, code: str, fields: object = None):
        self.code, self.fields = code, fields

    def __reduce__(self):
        names = None if self.fields is None else tuple(self.fields)
        return np.dtype, (self.code, False, True), (3, '|', None, names, self.fields, 8, 1, 63)


@pytest.mark.parametrize(
    'value',
    [
        np.array([None, 'x'], object), np.array(['x']), np.zeros(1, 'f8,i4'), np.dtype('M8[s]'),
        Dtype('O'), Dtype('V8', {'f': (np.dtype('O'), 0)}),
    ],
)  # fmt: skip
def test_other_arrays_are_refused(value, tmp_path):
    torch.save({'a': torch.ones(1), 'value': value}, tmp_path / 'x.pth')
    assert 'is refused: it holds numpy.dtype(' in refusal(tmp_path / 'x.pth')


def test_a_dtype_has_no_more_to_say(tmp_path):
    """What it says of itself besides the order of bytes is not taken."""
    value = Dtype('i8', {'f': (np.dtype('f8'), 0)})
    torch.save({'a': torch.ones(1), 'value': value}, tmp_path / 'x.pth')
    found = read_checkpoint(str(tmp_path / 'x.pth'))['value'].dtype
    assert (found, found.fields, found.flags) == (np.dtype('i8'), None, np.dtype('i8').flags)


def statistics_call(name: str) -> hostile.Call:
    return hostile.Call(getattr, HistoryBuffer, name)


@pytest.mark.parametrize('name', ['register_statistics', '__init__', '__class__'])
def test_getattr_is_for_statistics_alone(name, tmp_path):
    torch.save({'a': torch.ones(1), 'value': statistics_call(name)}, tmp_path / 'x.pth')
    assert 'is refused: it holds builtins.getattr' in refusal(tmp_path / 'x.pth')


@pytest.mark.parametrize('older', [False, True])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_not_finite(value, older, tmp_path):
    weights = {'a': torch.ones(3), 'b': torch.tensor([1.0, value]), 'c': torch.tensor(value)}
    torch.save(weights, tmp_path / 'x.pth', _use_new_zipfile_serialization=not older)
    assert refusal(tmp_path / 'x.pth').endswith('2 of its 3 weights are not finite, the first is b')
    torch.save({'state_dict': {'a': torch.ones(2)}, 'ema_state_dict': weights}, tmp_path / 'x.pth')
    assert '2 of its 4 weights are not finite, the first is ema_state_dict.b' in refusal(
        tmp_path / 'x.pth'
    )
    with pytest.raises(BadCheckpoint, match='not finite'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))


def test_kinds_of_tensors_that_are_no_weights(tmp_path):
    """One line, whatever they are."""
    meta = torch.ones(3, device='meta')
    torch.save({'a': meta}, tmp_path / 'x.pth')
    assert 'its weights cannot be examined' in refusal(tmp_path / 'x.pth')


def test_no_flipped_bit_passes(tmp_path):
    """The file is refused, or what is read is what was written."""
    state = {'state_dict': {f'layer{i}.weight': torch.randn(7) for i in range(4)}, 'meta': {'n': 3}}
    torch.save(state, tmp_path / 'x.pth')
    content = (tmp_path / 'x.pth').read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / 'y.pth').write_bytes(flipped)
        try:
            found = read_checkpoint(str(tmp_path / 'y.pth'))
        except BadCheckpoint:
            refused += 1
            continue
        assert found['meta'] == state['meta']
        assert found['state_dict'].keys() == state['state_dict'].keys()
        for name, value in state['state_dict'].items():
            assert torch.equal(found['state_dict'][name], value)
    assert refused > 100


def test_torch_alone_lets_one_pass(tmp_path):
    """That the test above can fail."""
    torch.save({'a': torch.ones(2)}, tmp_path / 'x.pth')
    content = (tmp_path / 'x.pth').read_bytes()
    ones = torch.ones(2).numpy().tobytes()
    (tmp_path / 'x.pth').write_bytes(content.replace(ones, b'\1' + ones[1:]))
    assert not torch.equal(torch.load(tmp_path / 'x.pth')['a'], torch.ones(2))
    assert 'the checksum of x/data/0 is wrong' in refusal(tmp_path / 'x.pth')


def link(path: Path) -> None:
    path.symlink_to('nowhere')


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    'missing': (lambda path: None, 'does not exist'),
    'broken link': (link, 'does not exist'),
    'empty': (Path.touch, 'may be damaged or no checkpoint (it is empty)'),
    'text': (lambda path: path.write_text('text\nof lines'), 'damaged or no checkpoint'),
    'folder': (Path.mkdir, 'cannot be read: it is a folder'),
    'pipe': (os.mkfifo, 'cannot be read: it is no file with content of its own'),
    'zeros': (lambda path: path.write_bytes(bytes(999)), 'damaged or no checkpoint'),
    'half': (
        lambda path: path.write_bytes(saved({'a': torch.ones(999)})[:2000]),
        'damaged or no checkpoint',
    ),
    'other zip': (lambda path: np.savez(path.open('wb'), a=[1]), 'damaged or no checkpoint'),
    'no weights': (lambda path: torch.save({'meta': {}}, path), 'holds no weights'),
    'a tensor': (lambda path: torch.save(torch.ones(3), path), 'holds no weights'),
}  # fmt: skip


def saved(state: object) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize('kind', NO_FILES)
def test_no_checkpoints(kind, tmp_path):
    make, message = NO_FILES[kind]
    make(tmp_path / 'x.pth')
    assert message in refusal(tmp_path / 'x.pth')


@pytest.mark.parametrize('file', ['/dev/null', '/dev/zero', 'x' * 300, 'a\0b', '~no-such-user/x'])
def test_strange_paths(file):
    refusal(file)


def test_what_may_not_be_read(tmp_path, monkeypatch):
    """Superusers may read everything, so the refusal of the system is made up."""
    torch.save({'a': torch.ones(1)}, tmp_path / 'x.pth')

    def refuse(*args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(checkpoints, '_damage', refuse)
    assert refusal(tmp_path / 'x.pth').endswith('cannot be read (Permission denied)')


@pytest.mark.parametrize(
    ('file', 'message'),
    [
        (NOWHERE, 'cannot be fetched'),
        ('http://', 'cannot be fetched'),
        ('http://[x/y.pth', 'cannot be fetched'),
        ('https://no host/x.pth', 'cannot be fetched'),
        ('mmcls://101', 'does not exist: mmcls has no such model'),
        ('openmmlab://101', 'does not exist: openmmlab has no such model'),
        ('open-mmlab://101', 'does not exist: open-mmlab has no such model'),
        ('torchvision://101', ''),  # torchvision need not be there
        ('pavi://x', 'cannot be fetched (ImportError: Please install pavi'),
        ('s3://x/y.pth', 'cannot be fetched'),
        ('petrel://x/y.pth', 'cannot be fetched'),
        ('other://x.pth', 'does not exist'),
    ],
)
def test_far_away(file, message, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    assert message in refusal(file)
    with pytest.raises(CheckpointNotFound):
        read_checkpoint(file)


class Server(http.server.BaseHTTPRequestHandler):
    content = b''
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(200 if self.path.startswith('/x.pth') else 404)
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine with one checkpoint; its address, and what it was asked for."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    handler = type('Handler', (Server,), {'asked': []})
    handler.content = saved({'module.a': torch.ones(2)})
    with http.server.HTTPServer(('127.0.0.1', 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{running.server_port}', handler.asked
        running.shutdown()
        thread.join()


def test_a_url_is_fetched_once(server):
    """Whoever reads it, and whatever the question after its name."""
    url, asked = server
    for _ in range(2):
        assert state_dict_of(read_checkpoint(f'{url}/x.pth?download=1')).keys() == {'a'}
        loaded = CheckpointLoader.load_checkpoint(f'{url}/x.pth')
        assert loaded['state_dict'].keys() == {'a'}
    assert asked == ['/x.pth?download=1']


def test_models_of_mmengine_are_fetched_likewise(server, tmp_path, monkeypatch):
    """By name, in one process of several: it waits for no other."""
    url, asked = server
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text(f'{{"mine": "{url}/x.pth"}}')
    monkeypatch.setattr('mmengine.runner.checkpoint.get_dist_info', lambda: (0, 2))
    assert state_dict_of(read_checkpoint('openmmlab://mine')).keys() == {'a'}
    assert asked == ['/x.pth']


def test_not_on_the_server(server):
    url, _ = server
    assert 'cannot be fetched (HTTP Error 404: Not Found)' in refusal(f'{url}/y.pth')


def test_a_server_that_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(checkpoints, 'PATIENCE', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as silent:
        url = f'http://127.0.0.1:{silent.getsockname()[1]}/x.pth'
        assert 'cannot be fetched (timed out)' in refusal(url)
    assert socket.getdefaulttimeout() is None


def test_missing_file_is_what_others_expect(tmp_path):
    """Whoever looks for mmengine's exception finds ours."""
    with pytest.raises(FileNotFoundError, match=r'none\.pth does not exist'):
        read_checkpoint(str(tmp_path / 'none.pth'))
