# SPDX-License-Identifier: Apache-2.0
"""Tensors in files, written and read by a thread of their own."""

import errno
import os
import shutil
import tempfile
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradsampler.engine.trajectory import version
from gradsampler.memory.snapshots import unchanged

_AHEAD = 2  # tensors that may wait to be written


class Folder:
    """A new folder that nobody else reads, for tensors.

    It is made with its first file, and goes with this object or when it is closed. A tensor must
    stay as it is until it is written, which is looked at when later ones are put, and in `settle`.

    Args:
        parent: an existing folder.
        memory: the name of the strategy, for messages.
        count: how many tensors it is to hold at a time, for messages.
    """

    def __init__(self, parent: Path, memory: str, count: int) -> None:
        self._parent, self._memory, self._count = parent, memory, count
        self._thread = ThreadPoolExecutor(1, "gradsampler-files")
        self._writing: deque[tuple[File, Tensor, int]] = deque()
        self._path: Path | None = None
        self._made = 0
        self._process = os.getpid()
        self.close: Callable[[], object] = lambda: None

    def put(self, x: Tensor) -> "File":
        """Has a tensor written; waits where two are still to be written."""
        try:
            if self._path is None:
                self._path = Path(tempfile.mkdtemp(prefix="gradsampler-", dir=self._parent))
                folder = (self._path, self._thread, self._process)
                self.close = weakref.finalize(self, _remove, *folder)
        except OSError as error:
            self._refused(error, x)
        while len(self._writing) >= _AHEAD:
            self._wait(*self._writing.popleft())
        file = File(self._path / f"{self._made}.state", x, self._thread, self._memory)
        self._made += 1
        self._writing.append((file, x, version(x)))
        return file

    def settle(self) -> None:
        """Waits for what is still to be written; RuntimeError in a fork, which has no thread."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"memory={self._memory}: the backward of a run whose states are in a folder must "
                f"be in the process of the run, {self._process}, got its fork {os.getpid()}; fork "
                "before the run, or take memory='checkpoint'"
            )
        while self._writing:
            self._wait(*self._writing.popleft())

    def _wait(self, file: "File", x: Tensor, before: int) -> None:
        try:
            file.checksum.result()
        except OSError as error:
            self._refused(error, x)
        unchanged(self._memory, x, before)

    def _refused(self, error: OSError, x: Tensor) -> NoReturn:
        self.close()
        size = x.numel() * x.element_size()
        raise OSError(
            error.errno or errno.EIO,
            f"memory={self._memory}: the folder {self._parent} must take {self._count * size} "
            f"bytes ({self._count} tensors of {size}), got {error.strerror or error}; make room "
            "or name another folder",
        ) from error


class File:
    """A tensor in a file, or on its way there or back.

    Args:
        path: of a file that is not there yet.
        x: the tensor.
        thread: that writes and reads.
        memory: the name of the strategy, for messages.
    """

    def __init__(self, path: Path, x: Tensor, thread: ThreadPoolExecutor, memory: str) -> None:
        self._path, self._thread, self._memory = path, thread, memory
        self._like, self._device = torch.empty_like(x, device="meta"), x.device
        self._coming: Future[Tensor] | None = None
        self.checksum = thread.submit(_write, path, x.to("cpu"))

    def fetch(self) -> None:
        """Has the file read."""
        if self._coming is None:
            self._coming = self._thread.submit(_read, self._path, self._like, self.checksum)

    def get(self) -> Tensor:
        """Returns the tensor on its device; OSError where the file is not what was written."""
        self.fetch()
        coming, self._coming = self._coming, None
        assert coming is not None
        try:
            return coming.result().to(self._device, non_blocking=True)
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"memory={self._memory}: {self._path} must hold the tensor that was written, got "
                f"{error.strerror or error}; run the sampler again",
            ) from error

    def rest(self) -> None:
        """Lets go of what was read and not asked for."""
        self._coming = None

    def drop(self) -> None:
        """Has the file removed."""
        self._thread.submit(self._path.unlink, missing_ok=True)


class Files:
    """The states of a run, each in a file.

    The run waits where two states are still to be written, and at its end for the last ones, so a
    folder that is full is known before there is a sample. Backward reads one file ahead.

    Args:
        parent: an existing folder.
        count: the number of states.
    """

    def __init__(self, parent: Path, count: int) -> None:
        self._folder = Folder(parent, "Offload", count)
        self._files: list[File] = []
        self._token: weakref.ref[Tensor] | None = None

    def save(self, index: int, x: Tensor) -> None:
        """Has the state of evaluation ``index`` written."""
        assert index == len(self._files)
        self._files.append(self._folder.put(x))

    def load(self, index: int) -> Tensor:
        """Returns a state, and has the one before it read."""
        self._files[index].fetch()
        if index > 0:
            self._files[index - 1].fetch()
        return self._files[index].get()

    def release(self) -> list[Tensor]:
        """Waits for what is still to be written, and hands autograd a token of the files."""
        self._folder.settle()
        for file in self._files:
            file.rest()
        token = torch.empty(0)
        if self._token is None:
            self._token = weakref.ref(token)
        return [token]

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Has the files removed when autograd drops the token, after a last backward."""
        self._folder.settle()
        (token,) = tensors
        # Another one comes back where hooks on saved tensors replace them: then the files stay as
        # long as the graph.
        if self._token is not None and self._token() is token:
            weakref.finalize(token, self._folder.close)


def _bytes(x: Tensor) -> memoryview:
    array: Any = x.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _write(path: Path, x: Tensor) -> int:
    """Writes a tensor; returns its checksum."""
    data = _bytes(x.contiguous())
    with path.open("xb") as file:
        file.write(data)
    return zlib.crc32(data)


def _read(path: Path, like: Tensor, checksum: Future[int]) -> Tensor:
    """Reads a tensor; OSError where its bytes are not those that were written."""
    written = checksum.result()  # of this same thread, so there by now
    x = torch.empty(like.shape, dtype=like.dtype)
    data = _bytes(x)
    with path.open("rb") as file:
        whole = file.readinto(data) == len(data) and not file.read(1)
    if not whole or zlib.crc32(data) != written:
        raise OSError(errno.EIO, "other bytes than were written")
    return x


def _remove(folder: Path, thread: ThreadPoolExecutor, process: int) -> None:
    """Stops the thread and removes the folder, except in a fork of the process that made it."""
    if os.getpid() != process:
        return
    with suppress(RuntimeError):  # this may be that thread, collecting garbage
        thread.shutdown(wait=True, cancel_futures=True)
    shutil.rmtree(folder, ignore_errors=True)
