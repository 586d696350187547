# SPDX-License-Identifier: Apache-2.0
"""Watches the torch functions of a pipeline's own code, outside of its models.

Three of them have no gradient where a pipeline uses them: a tensor filled with a guidance scale, a
tensor made of one, and the conversion to numpy at the end. And the draws of a scheduler are seen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["Glue", "Lifted"]

Draw = Callable[[tuple[int, ...], dict[str, Any]], Tensor | None]


class Glue(TorchFunctionMode):
    """A mode for the pipeline's own code; `paused` while a model runs.

    ``draw`` is called with the shape and the keyword arguments of each standard normal draw; what
    it returns takes its place, and with None the draw is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draw: Draw | None = None
        self._wide = False
        self._depth = 0

    def __enter__(self) -> "Glue":
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._depth -= 1
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SPECIAL:
            result = _SPECIAL[func](self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Turns the mode off for the time of a with statement, if it is on."""
        if not self._depth:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    @contextmanager
    def drawing(self, draw: Draw | None) -> Iterator[None]:
        """Sets ``draw`` for the time of a with statement."""
        before, self.draw = self.draw, draw
        try:
            yield
        finally:
            self.draw = before

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Leaves float64 as it is where the code would round it, in a with statement."""
        self._wide = True
        try:
            yield
        finally:
            self._wide = False

    def _to(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._wide and x.dtype == torch.float64:
            asked = (*args, *kwargs.values())
            if torch.float32 in asked:
                return x
        return NotImplemented

    def _float(self, x: Tensor, **_: Any) -> Any:
        return x if self._wide and x.dtype == torch.float64 else NotImplemented

    def _randn(self, *size: Any, **kwargs: Any) -> Any:
        if self.draw is None:
            return NotImplemented
        shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
        shape = kwargs.pop("size", shape)
        drawn = self.draw(tuple(int(n) for n in shape), kwargs)
        return NotImplemented if drawn is None else drawn

    def _randn_like(self, x: Tensor, **kwargs: Any) -> Any:
        if self.draw is None:
            return NotImplemented
        given = {k: v for k, v in kwargs.items() if k in ("dtype", "device", "generator")}
        drawn = self.draw(tuple(x.shape), {"dtype": x.dtype, "device": x.device, **given})
        return NotImplemented if drawn is None else drawn

    def _full(self, size: Any, fill_value: Any, **kwargs: Any) -> Any:
        if isinstance(fill_value, Lifted):
            fill_value = fill_value.origin
        if not _carries(fill_value):
            return NotImplemented
        fill = fill_value.to(kwargs.get("device"), kwargs.get("dtype") or fill_value.dtype)
        return fill.reshape(()).expand(tuple(size))

    def _tensor(self, data: Any, **kwargs: Any) -> Any:
        if isinstance(data, Lifted):
            data = data.origin
        if not isinstance(data, Tensor):
            return NotImplemented
        return data.to(kwargs.get("device"), kwargs.get("dtype") or data.dtype, copy=True)

    def _numpy(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return x.detach().numpy(*args, **kwargs) if x.requires_grad else NotImplemented


class Lifted(Tensor):
    """A number that requires grad and passes where torch wants a number without.

    `torch.full` refuses a tensor that requires grad before any mode sees it. Every other function
    is called with the number itself.
    """

    origin: Tensor

    @classmethod
    def of(cls, origin: Tensor) -> "Lifted":
        """The number in disguise."""
        lifted = origin.detach().as_subclass(cls)
        lifted.origin = origin
        return lifted

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = partial(pytree.tree_map_only, Lifted, lambda x: x.origin)
        return func(*plain(args), **plain(kwargs or {}))


def _carries(x: object) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


_SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.randn: Glue._randn,
    torch.randn_like: Glue._randn_like,
    torch.full: Glue._full,
    torch.tensor: Glue._tensor,
    Tensor.numpy: Glue._numpy,
    Tensor.to: Glue._to,
    Tensor.float: Glue._float,
}
