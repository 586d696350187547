# SPDX-License-Identifier: Apache-2.0
"""Digests that are the same in another process: of tensors by their bytes, of code, of texts."""

import hashlib
from collections.abc import Iterable
from types import CodeType

import torch
from torch import Tensor

_CHUNK = 1 << 26  # elements of a tensor on the host at a time


def of_texts(texts: Iterable[str]) -> str:
    """Sixteen hexadecimal digits that stand for texts in their order.

    Example:
        >>> of_texts(["a", "b"]) == of_texts(["a", "b"]) != of_texts(["b", "a"])
        True
    """
    return of_bytes("\n".join(texts).encode())


def of_bytes(data: bytes) -> str:
    """Sixteen hexadecimal digits that stand for bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def of_tensor(x: Tensor) -> str:
    """Dtype, shape, and a digest of the values, to the bit and the same on every device."""
    head = f"{x.dtype} {list(x.shape)}"
    if x.is_meta:
        return f"{head} without values"
    flatten = getattr(x, "__tensor_flatten__", None)  # a subclass made of other tensors
    if flatten is not None:
        return f"{head} {of_texts(of_tensor(getattr(x, name)) for name in flatten()[0])}"
    x = x.detach() if x.layout == torch.strided else x.detach().to_dense()
    sha = hashlib.sha256()
    for piece in x.resolve_conj().resolve_neg().reshape(-1).split(_CHUNK):
        sha.update(piece.to("cpu").contiguous().view(torch.uint8).numpy())
    return f"{head} {sha.hexdigest()[:16]}"


def of_code(code: CodeType) -> str:
    """A function's instructions and constants, those of the functions in it included."""
    constants = []
    for c in code.co_consts:
        if isinstance(c, CodeType):
            constants.append(of_code(c))
        else:  # the order of a set is that of this process
            constants.append(repr(sorted(c, key=repr)) if isinstance(c, frozenset) else repr(c))
    return of_texts([code.co_code.hex(), *code.co_names, *constants])
