"""What autograd keeps for the backward pass."""

from collections.abc import Callable

import torch


def saved_bytes(function: Callable[[], object]) -> int:
    """Of the storages, each counted once, that the backward pass of ``function()`` needs."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no address is given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in storages.values())
