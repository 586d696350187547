# SPDX-License-Identifier: Apache-2.0
"""States in files, written and read by a thread of their own."""

import errno
import os
import shutil
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

_AHEAD = 2  # states that may wait to be written


class Files:
    """One file a state, in a new folder that nobody else reads.

    The run waits where two states are still to be written, and at its end for the last ones, so a
    folder that is full is known before there is a sample. Backward reads one file ahead.

    Args:
        parent: an existing folder.
        count: the number of states.
    """

    def __init__(self, parent: Path, count: int) -> None:
        self._parent, self._count = parent, count
        self._folder: Path | None = None
        self._thread = ThreadPoolExecutor(1, "gradsampler-files")
        self._writing: deque[Future[int]] = deque()
        self._reading: dict[int, Future[Tensor]] = {}
        self._sums: list[int] = []
        self._like = torch.empty(0)  # of a state's shape and dtype, without memory
        self._device = torch.device("cpu")
        self._token: weakref.ref[Tensor] | None = None

    def save(self, index: int, x: Tensor) -> None:
        """Has the state of evaluation ``index`` written."""
        try:
            if self._folder is None:
                self._open(x)
            while len(self._writing) >= _AHEAD:
                self._sums.append(self._writing.popleft().result())
        except OSError as error:
            self._refused(error)
        self._writing.append(self._thread.submit(_write, self._path(index), x.to("cpu")))

    def load(self, index: int) -> Tensor:
        """Returns a state, and has the one before it read."""
        coming = self._reading.pop(index, None) or self._read(index)
        if index > 0:
            self._reading[index - 1] = self._read(index - 1)
        try:
            return coming.result().to(self._device, non_blocking=True)
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"memory=Offload: {self._path(index)} must hold the state that was written, got "
                f"{error.strerror or error}; run the sampler again",
            ) from error

    def release(self) -> list[Tensor]:
        """Waits for what is still to be written, and hands autograd a token of the files."""
        try:
            while self._writing:
                self._sums.append(self._writing.popleft().result())
        except OSError as error:
            self._refused(error)
        self._reading.clear()
        token = torch.empty(0)
        if self._token is None:
            self._token = weakref.ref(token)
        return [token]

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Has the files removed when autograd drops the token, after a last backward."""
        (token,) = tensors
        # Another one comes back where hooks on saved tensors replace them: then the files stay as
        # long as the graph.
        if self._token is not None and self._token() is token:
            weakref.finalize(token, self._remove)

    def _open(self, x: Tensor) -> None:
        self._like, self._device = torch.empty_like(x, device="meta"), x.device
        self._folder = Path(tempfile.mkdtemp(prefix="gradsampler-", dir=self._parent))
        self._remove = weakref.finalize(self, _remove, self._folder, self._thread, os.getpid())

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{index}.state"

    def _read(self, index: int) -> Future[Tensor]:
        return self._thread.submit(_read, self._path(index), self._like, self._sums[index])

    def _refused(self, error: OSError) -> NoReturn:
        if self._folder is not None:
            self._remove()
        size = self._like.numel() * self._like.element_size()
        raise OSError(
            error.errno or errno.EIO,
            f"memory=Offload: the folder {self._parent} must take {self._count * size} bytes "
            f"({self._count} states of {size}), got {error.strerror or error}; make room or name "
            "another folder",
        ) from error


def _bytes(x: Tensor) -> memoryview:
    array: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write(path: Path, x: Tensor) -> int:
    """Writes a state; returns its checksum."""
    data = _bytes(x.contiguous())
    with path.open("xb") as file:
        file.write(data)
    return zlib.crc32(data)


def _read(path: Path, like: Tensor, checksum: int) -> Tensor:
    """Reads a state; OSError where its bytes are not those that were written."""
    x = torch.empty(like.shape, dtype=like.dtype)
    data = _bytes(x)
    with path.open("rb") as file:
        whole = file.readinto(data) == len(data) and not file.read(1)
    if not whole or zlib.crc32(data) != checksum:
        raise OSError(errno.EIO, "other bytes than were written")
    return x


def _remove(folder: Path, thread: ThreadPoolExecutor, process: int) -> None:
    """Stops the thread and removes the folder, except in a fork of the process that made it."""
    if os.getpid() != process:
        return
    with suppress(RuntimeError):  # this may be that thread, collecting garbage
        thread.shutdown(wait=True, cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)
