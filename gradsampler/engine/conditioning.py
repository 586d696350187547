# SPDX-License-Identifier: Apache-2.0
"""The keyword arguments of a denoiser, with their tensors taken out."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from torch.utils import _pytree as pytree

from gradsampler import _checks


class Conditioning:
    """A dict for the denoiser, whose tensors can be put in place of others.

    Tensors are found in nested lists, tuples and dicts too.
    """

    def __init__(self, cond: Mapping[str, Any] | None) -> None:
        if cond is not None and not isinstance(cond, Mapping):
            _checks.fail_type("cond", "be a dict or None", cond)
        for key in cond or ():
            if not isinstance(key, str):
                _checks.fail_type("cond: each key", "be a str, as a keyword argument", key)
        self._empty = not cond
        named, self._structure = pytree.tree_flatten_with_path(dict(cond or {}))
        self._leaves = [_checked(f"cond{pytree.keystr(path)}", x) for path, x in named]
        self._places = [i for i, x in enumerate(self._leaves) if isinstance(x, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the dict."""
        return [self._leaves[i] for i in self._places]

    def filled(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The dict with ``tensors`` in the places of its own."""
        if self._empty:
            return {}
        leaves = list(self._leaves)
        for i, x in zip(self._places, tensors, strict=True):
            leaves[i] = x
        return cast(dict[str, Any], pytree.tree_unflatten(leaves, self._structure))


def _checked(argument: str, x: Any) -> Any:
    """A leaf of the dict as a run can take it."""
    if not isinstance(x, Tensor):
        return x
    _checks.valued(argument, x)
    if x.requires_grad and x.dtype.is_floating_point and x.dtype not in _checks.FLOATING:
        hint = "its gradient would be a sum in that dtype: give it as torch.bfloat16"
        _checks.fail(argument, "have 16 bits or more to require grad", x.dtype, hint)
    return _checks.savable(x)
