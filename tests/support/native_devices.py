# SPDX-License-Identifier: Apache-2.0
"""Where the native extension's own tests run: on the CPU, and on a GPU that it was built for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradsampler.ops import backends

DEVICES = [name for name in ("cpu", "cuda") if backends.present(name)]


@contextmanager
def default(device: str) -> Iterator[None]:
    """New tensors are made on that device."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
