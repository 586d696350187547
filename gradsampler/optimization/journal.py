# SPDX-License-Identifier: Apache-2.0
"""An optimisation's state on disk, replaced atomically after each step."""

import contextlib
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from gradsampler import _checks

_FORMAT = "gradsampler.optimize/1"


class Journal:
    """A file that holds the last completed step of one optimisation.

    Args:
        path: the file; its folder must exist and be writable.
        identity: what makes the optimisation the same one, as plain values; a file with another
            identity is refused, so that no run goes on from the state of a different one.
    """

    def __init__(self, path: str | os.PathLike[str], identity: dict[str, Any]) -> None:
        if not isinstance(path, str | os.PathLike):
            _checks.fail_type("checkpoint", "be a path", path)
        self._path = Path(path)
        self._identity = identity
        folder = self._path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            _checks.fail("checkpoint", "lie in a folder that exists and is writable", self._path)
        if self._path.is_dir():
            _checks.fail("checkpoint", "be a file", f"the folder {self._path}")

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None where there is no file yet."""
        if not self._path.exists():
            return None
        content = self._read()
        differing = [k for k, v in self._identity.items() if content["identity"].get(k) != v]
        if differing:
            was = {k: content["identity"].get(k) for k in differing}
            now = {k: self._identity[k] for k in differing}
            hint = "remove the file or choose another to start anew"
            _checks.fail("checkpoint", f"be of this run with {now}", f"{self._path} of {was}", hint)
        state: dict[str, Any] = content["state"]
        return state

    def _read(self) -> dict[str, Any]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's advice on how to read foreign pickles
                content = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # a foreign file can make a reader fail in any way
            _checks.fail(
                "checkpoint",
                "be an optimisation checkpoint of gradsampler",
                f"{self._path}, which is truncated or of another kind ({type(error).__name__})",
                "remove the file or choose another to start anew",
            )
        known = isinstance(content, dict) and content.get("format") == _FORMAT
        if not known or not all(isinstance(content.get(k), dict) for k in ("identity", "state")):
            _checks.fail(
                "checkpoint", f"be of the format {_FORMAT}", f"{self._path} of another kind"
            )
        return content

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file by one with ``state``: a crash leaves the old one or the new one."""
        content = {"format": _FORMAT, "identity": self._identity, "state": state}
        handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self._path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
