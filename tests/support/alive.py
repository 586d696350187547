# SPDX-License-Identifier: Apache-2.0
"""What is alive when: activations, states, the bytes of all tensors."""

import gc
import weakref
from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.problems import normal
from support.runs import leaf


class Alive(TorchDispatchMode):
    """Storages that came into being while it was on, except those of the tensors ``there``."""

    def __init__(self, there=()):
        super().__init__()
        self.now = self.most = 0
        self.seen = {x.untyped_storage()._cdata for x in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        self.most = max(self.most, self.now)
        return results

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += size
            weakref.finalize(storage, self.gone, key, size)

    def gone(self, key, size):
        self.seen.remove(key)
        self.now -= size


class Watched:
    """A denoiser that keeps an eye on its activations and its inputs."""

    def __init__(self):
        self.weight = leaf(normal(3, seed=3))
        self.activations = []
        self.states = []
        self.alive = []  # at each call: earlier activations and earlier inputs still there

    def __call__(self, x, sigma):
        self.alive.append((self.count(self.activations), self.count(self.states)))
        hidden = torch.tanh(x * self.weight)
        self.activations.append(StorageWeakRef(hidden.untyped_storage()))
        self.states.append(StorageWeakRef(x.untyped_storage()))
        return hidden * hidden

    @staticmethod
    def count(references):
        return sum(not reference.expired() for reference in references)


@contextmanager
def no_collector():
    """Memory must go by reference counts: on a GPU nobody waits for the cycle collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
