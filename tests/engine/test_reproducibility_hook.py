"""A resumed run is equal to an undisturbed one, and workers make no difference."""

# ruff: noqa: NPY002, as transforms use the legacy generator

import contextlib
import itertools
import random

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from small_runs import Each, Kill, kill, make_runner, weights

LOADERS = [(0, False), (2, False), (2, True)]


def train(work_dir, iteration=None, act=None, **settings):
    """The Runner after training, and what it was trained on."""
    each = Each(iteration, act)
    runner = make_runner(work_dir, each, **settings)
    with contextlib.suppress(Kill):
        runner.train()
    # Its workers end at once.
    runner.train_loop.dataloader_iterator = runner.train_dataloader._iterator = None
    return runner, each.inputs, each.indices


def assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize('by_epoch', [True, False])
def test_resumed_equals_undisturbed(by_epoch, tmp_path):
    """Killed in the second of three periods; the first checkpoint is after 5 iterations."""
    whole, inputs, _ = train(tmp_path / 'whole', by_epoch=by_epoch)
    assert len(inputs) == 15
    for workers, persistent in LOADERS:
        work_dir = tmp_path / f'{workers}{persistent}'
        settings = {'by_epoch': by_epoch, 'workers': workers, 'persistent': persistent}
        _, before, _ = train(work_dir, 8, kill, **settings)
        resumed, after, _ = train(work_dir, resume=True, **settings)
        assert_equal(before, inputs[:8])
        assert_equal(after, inputs[5:])
        assert_equal(weights(resumed), weights(whole))
        assert_equal(resumed.optim_wrapper.state_dict(), whole.optim_wrapper.state_dict())


def test_draws_differ(tmp_path):
    """Every picture in every epoch has its own; another seed gives others."""
    _, inputs, _ = train(tmp_path / '0')
    rows = [tuple(row.tolist()) for batch in inputs for row in batch]
    for column in (1, 2, 3):
        assert len({row[column] for row in rows}) == 30
    _, others, _ = train(tmp_path / '1', seed=1)
    assert not any(torch.equal(a, b) for a, b in itertools.product(inputs, others))


class Draw(Hook):
    """Draws random numbers whenever it is called outside of iterations."""

    def before_train(self, runner):
        random.random(), np.random.rand(), torch.rand(1)

    before_train_epoch = after_train_epoch = before_train

    def before_save_checkpoint(self, runner, checkpoint):
        self.before_train(runner)


@pytest.mark.parametrize('by_epoch', [True, False])
def test_draws_of_others_change_nothing(by_epoch, tmp_path):
    plain, _, _ = train(tmp_path / 'a', by_epoch=by_epoch)
    each = Each()
    runner = make_runner(tmp_path / 'b', each, by_epoch=by_epoch)
    runner.register_hook(Draw(), 'LOWEST')
    runner.train()
    assert_equal(weights(runner), weights(plain))


def test_seed_that_no_config_sets(tmp_path):
    """Is random, and on resumption that of the checkpoint, of the sampler, too."""
    whole, inputs, _ = train(tmp_path / 'a', seed=None)
    _, others, _ = train(tmp_path / 'b', 8, kill, seed=None)
    assert not torch.equal(inputs[0], others[0])
    (tmp_path / 'c').mkdir()
    first = torch.load(tmp_path / 'a' / 'epoch_1.pth', weights_only=True)
    torch.save(first, tmp_path / 'c' / 'epoch_1.pth')
    resumed, after, _ = train(tmp_path / 'c', seed=None, resume=True)
    assert_equal(after, inputs[5:])
    assert_equal(weights(resumed), weights(whole))


@pytest.mark.parametrize('workers', [0, 2])
def test_iterations_over_a_finite_sampler(workers, tmp_path):
    """Where the loop counts iterations and the sampler has an end, as mmengine allows."""
    settings = {
        'by_epoch': False, 'workers': workers, 'sampler': {'type': 'DefaultSampler'},
        'checkpoint': {'interval': 4},
    }  # fmt: skip
    whole, inputs, _ = train(tmp_path / 'a', **settings)
    seen = [sorted(row[0].item() for batch in inputs[i : i + 5] for row in batch) for i in (0, 5)]
    assert seen == [list(range(10))] * 2
    assert not torch.equal(torch.cat(inputs[:5])[:, 0], torch.cat(inputs[5:10])[:, 0])
    train(tmp_path / 'b', 14, kill, **settings)
    resumed, after, _ = train(tmp_path / 'b', resume=True, **settings)
    assert_equal(after, inputs[12:])
    assert_equal(weights(resumed), weights(whole))


def test_checkpoint_within_an_epoch(tmp_path):
    """The epoch goes on where it was, and its batches are counted on."""
    settings = {'checkpoint': {'by_epoch': False, 'interval': 4}}
    whole, inputs, indices = train(tmp_path / 'a', **settings)
    train(tmp_path / 'b', 10, kill, **settings)
    resumed, after, counted = train(tmp_path / 'b', resume=True, **settings)
    assert_equal(after, inputs[8:])
    assert counted == indices[8:] == [3, 4, 0, 1, 2, 3, 4]
    assert_equal(weights(resumed), weights(whole))


def test_another_number_of_batches(tmp_path):
    """The position in the epoch means nothing then: it begins again."""
    settings = {'checkpoint': {'by_epoch': False, 'interval': 4}}
    train(tmp_path, 10, kill, **settings)
    _, after, counted = train(tmp_path, resume=True, size=12, **settings)
    assert counted == [*range(6), *range(6)]
    assert len({row[0].item() for batch in after[:6] for row in batch}) == 12


@pytest.mark.parametrize('by_epoch', [True, False])
def test_no_batch(by_epoch, tmp_path):
    """Otherwise mmengine would train nothing, or look for data without end."""
    runner = make_runner(tmp_path, by_epoch=by_epoch, size=1, sampler={'type': 'DefaultSampler'})
    runner._train_dataloader['drop_last'] = True
    with pytest.raises(ValueError, match='gives no batch: 1 pictures, batch_size 2, drop_last Tr'):
        runner.train()
