# SPDX-License-Identifier: Apache-2.0
"""Which implementations of the fused ops are present, and how one is chosen.

A backend is a module with the functions of `gradsampler.reference`.
"""

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from gradsampler import _checks, reference


class Backend(Protocol):
    """The fused ops of one implementation, as `gradsampler.reference` defines them."""

    def step(self, *args: Any) -> Tensor:
        """One affine stage with its injected noise."""

    def reparameterize(self, *args: Any) -> Tensor:
        """A draw that passes the gradient on."""

    def ancestral_step(self, *args: Any) -> Tensor:
        """One ancestral step."""

    def flow_pair(self, *args: Any) -> tuple[Tensor, Tensor]:
        """A flow-matching training pair."""


_MODULES = {"reference": reference}


def available() -> dict[str, str]:
    """The backends and their versions.

    Example:
        >>> import gradsampler as gs
        >>> "reference" in gs.backends.available()
        True
    """
    return {"reference": f"torch {torch.__version__}"}


def choose(name: str | None) -> Backend:
    """The backend of that name, or the fastest one present."""
    return cast(Backend, _MODULES[_checks.choice("backend", name or "reference", _MODULES)])
