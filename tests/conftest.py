# SPDX-License-Identifier: Apache-2.0
"""What all tests share: Triton's interpreter where there is no GPU, one thread a process."""

import gc
import os
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("support")

# Tensors are tiny here: a second thread costs more than it brings, and two processes run at once.
torch.set_num_threads(1)

RECORDER = pytest.StashKey()

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported


def pytest_sessionstart(session):
    folder = os.environ.get("GRADSAMPLER_VARIANTS")
    if folder:  # for another Triton to compile, see `make test-oldest`
        from support import variants

        session.stash[RECORDER] = variants.Recorder(Path(folder).absolute())


def pytest_sessionfinish(session):
    if RECORDER in session.stash:
        session.stash[RECORDER].write()


def pytest_collection_finish():
    """What is there now stays to the end: the collector need not look at it in each test."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # modules in C look for leaks at the end


@pytest.fixture
def fresh_compiler():
    """An empty compiler; for `support.compiling`."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
