# SPDX-License-Identifier: Apache-2.0
"""Which implementations of the fused ops are present, why another is not, and the choice of one.

A backend has the functions of `gradsampler.reference`, with the same arguments.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from gradsampler import _checks, reference

__all__ = ["Backend", "available", "choose"]

MAX_TERMS = 6  # of one fused step


@dataclass(frozen=True)
class Backend:
    """The fused ops of one implementation."""

    name: str
    step_fwd: Callable[..., Any]
    step_bwd: Callable[..., Any]
    adjoint_step: Callable[..., Any]
    ancestral_step_fwd: Callable[..., Any]
    ancestral_step_bwd: Callable[..., Any]
    flow_pair_fwd: Callable[..., Any]
    flow_pair_bwd: Callable[..., Any]

    @classmethod
    def of(cls, name: str, *modules: ModuleType) -> "Backend":
        """Collects the functions from the modules that hold them."""
        found = {k: v for module in modules for k, v in vars(module).items()}
        return cls(name, *(found[field] for field in list(cls.__dataclass_fields__)[1:]))


REFERENCE = Backend.of("reference", reference)


def available() -> dict[str, str]:
    """Every backend with its version, or with the reason why it is absent.

    Example:
        >>> import gradsampler as gs
        >>> gs.backends.available()["reference"].startswith("torch")
        True
    """
    found = {"reference": f"torch {torch.__version__}"}
    triton, reason = _triton()
    found["triton"] = reason if triton is None else f"triton {reason}"
    return found


def choose(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or the fastest one present for tensors on ``device``.

    Raises:
        ValueError: for an unknown name, an absent backend, or one that cannot serve the device.
    """
    if name is None:
        triton = _triton()[0] if device.type == "cuda" else None
        return triton or REFERENCE
    if _checks.choice("backend", name, ("reference", "triton")) == "reference":
        return REFERENCE
    triton, reason = _triton()
    if triton is None:
        _checks.fail("backend", "be present", f"'triton', which is not: {reason}")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        _checks.fail(
            "backend", "serve tensors on cpu", "'triton'", "set TRITON_INTERPRET=1 to interpret it"
        )
    return triton


@cache
def _triton() -> tuple[Backend | None, str]:
    """The Triton backend and its version, or None and the reason."""
    try:
        import triton

        from gradsampler.kernels import adjoint, ancestral, flow_pair, step
    except ImportError as error:
        return None, f"import failed: {error}"
    return Backend.of("triton", step, adjoint, ancestral, flow_pair), triton.__version__
