# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of all tensors that are alive."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
