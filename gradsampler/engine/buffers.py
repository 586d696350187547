# SPDX-License-Identifier: Apache-2.0
"""The buffers that model calls change: running statistics, counters.

A call that is made again gets copies in the place of the buffers that the run changed, with the
values that the first call saw. What it changes is lost with the copies, so the buffers stay as the
first calls left them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.engine.trajectory import version
from gradsampler.repetition import ReplayError

_ROOM = 2**26  # bytes of copies; beside them the largest buffers are taken to stay as they are

Values = Mapping[int, Tensor | None]  # by place


class Buffers:
    """The buffers of modules, followed through a run.

    Torch counts changes in place, but not those of the running statistics of batch normalisation.
    So the buffers of modules in train mode are compared at the end of the run as well.

    Args:
        modules: each once.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._places = [(module, name) for module in modules for name in module._buffers]
        self._stamps = self._stamped()
        self._first: dict[int, Tensor | None] = {}  # the values before the run
        room = _ROOM
        for i, (x, _) in sorted(enumerate(self._stamps), key=lambda place: _size(place[1][0])):
            room -= _size(x)
            if room < 0:
                break
            self._first[i] = _copied(x)
        self._changed: dict[int, Tensor | None] = {}  # the present values

    def before(self) -> Values:
        """The values, before a call, of the buffers that were changed until then."""
        stamps = self._stamped()
        for i, ((old, then), (new, now)) in enumerate(zip(self._stamps, stamps, strict=True)):
            if old is not new or then != now:
                self._changed[i] = _copied(new)
                if new is not None and new.requires_grad:
                    _checks.fail(
                        f"denoiser: its buffer {self._name(i)}",
                        "carry no gradient from one call to the next",
                        "one that requires grad",
                        "detach it, or take memory='store'",
                    )
        self._stamps = stamps
        return dict(self._changed)

    def finish(self) -> None:
        """Ends the run: finds what else has changed, and lets go of the rest."""
        self.before()
        flags: dict[torch.device, dict[int, Tensor]] = {}
        for i, value in self._first.items():
            x = self._stamps[i][0]
            if i in self._changed or value is None or x is None or not _comparable(x):
                continue
            if self._places[i][0].training:
                flags.setdefault(x.device, {})[i] = (x != value).any()
        for found in flags.values():
            for i, flag in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
                if flag:
                    self._changed[i] = self._first[i]  # normalising in train mode reads no other
        self._first = {i: x for i, x in self._first.items() if i in self._changed}

    @contextmanager
    def replaced(self, values: Values) -> Iterator[None]:
        """Puts copies of what `before` returned in the place of all that the run changed, for the
        time of a with statement.
        """
        present = {i: self._present(i) for i in self._changed}
        copies: dict[int, Tensor | None] = {}  # one for a buffer that modules share
        for i, x in present.items():
            if i not in values and i not in self._first:
                raise ReplayError(
                    f"the denoiser's buffer {self._name(i)} must stay as it is in the first call, "
                    f"got a change of one of {_size(x)} bytes, too many for a copy beforehand; "
                    "take memory='store'"
                )
            shared = i if x is None else id(x)
            if shared not in copies:
                copies[shared] = _copied(values.get(i, self._first.get(i)))
        try:
            for i, x in present.items():
                self._put(i, copies[i if x is None else id(x)])
            yield
        finally:
            for i, x in present.items():
                self._put(i, x)

    def __bool__(self) -> bool:
        return bool(self._places)

    def _stamped(self) -> list[tuple[Tensor | None, int]]:
        """Each buffer, and how often it was changed in place."""
        found = (module._buffers.get(name) for module, name in self._places)
        return [(x, 0 if x is None else version(x)) for x in found]

    def _present(self, i: int) -> Tensor | None:
        module, name = self._places[i]
        return module._buffers.get(name)

    def _put(self, i: int, x: Tensor | None) -> None:
        module, name = self._places[i]
        module._buffers[name] = x

    def _name(self, i: int) -> str:
        module, name = self._places[i]
        return f"{type(module).__name__}.{name}"


def _size(x: Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def _copied(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().clone()


def _comparable(x: Tensor) -> bool:
    plain = x.layout == torch.strided and not x.is_meta
    return plain and x.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
