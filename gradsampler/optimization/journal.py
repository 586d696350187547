# SPDX-License-Identifier: Apache-2.0
"""An optimisation's state on disk, replaced atomically after each step."""

import contextlib
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradsampler import _checks
from gradsampler.optimization import digest
from gradsampler.optimization.identity import Lines

_FORMAT = b"gradsampler.optimize/2\n"  # then the SHA-256 of all that follows it
_ANEW = "remove the file or choose another to start anew"
_SHOWN = 5  # differences that a message lists


class Journal:
    """A file that holds the last completed step of one optimisation.

    Args:
        path: the file; its folder must exist and be writable.
        identity: what makes the optimisation the same one, in lines by the name of an argument; a
            file with another identity is refused, so that no run goes on from the state of a
            different one. An argument that is named by the user has one line, at "".
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, Lines]) -> None:
        if not isinstance(path, str | os.PathLike):
            _checks.fail_type("checkpoint", "be a path", path)
        self._path = Path(path)
        self._identity = dict(identity)
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
        state: dict[str, Any] = content["state"]
        self._compare(content["identity"], state["buffers"])
        return state

    def _compare(self, saved: dict[str, Lines], restored: Mapping[str, Any]) -> None:
        """Refuses the identity of another run; what the file restores need not be the same."""
        now: list[str] = []
        was: list[str] = []
        said: list[str] = []
        for name in dict.fromkeys((*self._identity, *saved)):
            own, other = self._identity.get(name, {}), saved.get(name, {})
            whole = fingerprint(other)
            if own == {"": whole}:
                self._identity[name] = other  # the user says that it is the same
                continue
            places = [
                place
                for place in sorted({*own, *other})
                if own.get(place) != other.get(place) and f"{name}{place}" not in restored
            ]
            now += (f"{name}{place} {own.get(place, 'absent')}" for place in places)
            was += (f"{name}{place} {other.get(place, 'absent')}" for place in places)
            said += [f"{name!r}: {whole!r}"] if places else []
        if now:
            same = f"if it is the same, say so by identity={{{', '.join(said)}}}"
            expected, got = _listed(now), f"{self._path} of {_listed(was)}"
            _checks.fail("checkpoint", f"be of this run with {expected}", got, f"{same}; {_ANEW}")

    def _read(self) -> dict[str, Any]:
        data = self._path.read_bytes()
        head, payload = data[: len(_FORMAT) + 32], data[len(_FORMAT) + 32 :]
        if head != _FORMAT + hashlib.sha256(payload).digest():
            _checks.fail(
                "checkpoint",
                f"be an optimisation checkpoint of the format {_FORMAT.decode().strip()}",
                f"{self._path}, whose {len(data)} bytes are truncated, damaged or of another kind",
                _ANEW,
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on how to read foreign pickles
            content: dict[str, Any] = torch.load(
                io.BytesIO(payload), map_location="cpu", weights_only=True
            )
        return content

    def save(self, state: dict[str, Any]) -> None:
        """Replaces the file by one with ``state``: a crash leaves the old one or the new one."""
        buffer = io.BytesIO()
        torch.save({"identity": self._identity, "state": state}, buffer)
        payload = buffer.getvalue()
        data = _FORMAT + hashlib.sha256(payload).digest() + payload
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(
                prefix=f".{self._path.name}.", dir=self._path.parent
            )
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException as error:
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            if not isinstance(error, OSError):
                raise
            there = "is still that of the step before" if self._path.exists() else "is not there"
            what = f"checkpoint: {len(data)} bytes could not be written, the file {there}"
            raise OSError(error.errno, f"{what}: {error.strerror}", str(self._path)) from error


def fingerprint(lines: Lines) -> str:
    """Sixteen hexadecimal digits that stand for lines."""
    return digest.of_texts(f"{place} {text}" for place, text in sorted(lines.items()))


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more
