# SPDX-License-Identifier: Apache-2.0
"""The weights that a denoiser computes with: can a run take them, and do they fit its input?"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsampler import _checks
from gradsampler.engine import parts
from gradsampler.parameterization import Parameterization

_DTYPES = re.compile(r"dtype|scalar type|type \(\S+\)")
_SUMMED = {*_checks.FLOATING, torch.complex64, torch.complex128}
_META = re.compile(r"\bmeta\b")


def check(model: Parameterization, seen: parts.Seen, *, saved: bool) -> None:
    """Refuses weights without values, and, where autograd saves them, those it cannot save or sum.

    Weights on meta that a function hides may come and go, by the hooks of accelerate, or not be
    used: of these torch's error tells, by `explain`.
    """
    declared = [part for module in model.modules() for part in module.modules()]
    if not any(hasattr(part, "_hf_hook") for part in declared):
        for name, x in _named(declared):
            if x.is_meta:
                _fail_meta(name)
    if not saved or not torch.is_grad_enabled():
        return
    for name, x in _named(seen.parts.modules):
        if not _tracked(x):
            _checks.fail(
                f"denoiser: its weight {name}",
                "be made outside of torch.inference_mode, as autograd saves it",
                "an inference tensor",
                "take network = copy.deepcopy(network), once, or run under torch.no_grad()",
            )
        if x.requires_grad and x.dtype not in _SUMMED:
            _checks.fail(
                f"denoiser: its weight {name}",
                "be frozen, as no gradient can be summed up in its dtype",
                f"one of {x.dtype} that requires grad",
                "network.requires_grad_(False)",
            )


def explain(
    error: RuntimeError, model: Parameterization, x: Tensor, level: Tensor, cond: Mapping[str, Any]
) -> None:
    """Raises a message in place of torch's error, where that is about weights."""
    if not (_META.search(str(error)) or _DTYPES.search(str(error))):
        return
    found = list(_named(parts.reachable(model).modules))
    if _META.search(str(error)):
        for name, weight in found:
            if weight.is_meta:
                _fail_meta(name, error)
    weights = {weight.dtype for _, weight in found if weight.dtype.is_floating_point}
    tensors = [y for y in pytree.tree_leaves(cond) if isinstance(y, Tensor)]
    given = {y.dtype for y in tensors if y.dtype.is_floating_point}
    if not weights or {x.dtype, level.dtype, *given} == weights:
        return
    if weights - {*_checks.FLOATING}:
        hint = "weights of 8 bits are for storage, and their layers have to cast them"
    elif x.dtype not in weights:
        hint = "name the network, modules=[network], for the run to call it in its dtype, or cast"
    else:
        hint = "cast levels and conditioning in the denoiser: levels come in float32 at least"
    got = f"a state of {x.dtype}, levels of {level.dtype}"
    got += f" and conditioning of {_listed(given)}" if given else ""
    raise TypeError(
        f"denoiser: what it is called with must fit its weights of {_listed(weights)}, got {got}; "
        f"{hint} (torch: {str(error).splitlines()[0]})"
    ) from error


def _fail_meta(name: str, error: RuntimeError | None = None) -> NoReturn:
    way = "load it, as with load_state_dict(..., assign=True)"
    text = f"denoiser: its weight {name} must hold values, got a tensor on the device meta; {way}"
    raise ValueError(text) from error


def _tracked(x: Tensor) -> bool:
    """Whether torch counts changes in place; of an inference tensor not, whatever its .data."""
    try:
        return x._version >= 0
    except RuntimeError:
        return False


def _named(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    yield f"{type(module).__name__}.{name}", x


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(map(str, dtypes)))
