# SPDX-License-Identifier: Apache-2.0
"""Which implementations of the fused ops are present, and how one is chosen.

A backend is a module with the functions of `gradsampler.reference`.
"""

from typing import Protocol, cast

import torch
from torch import Tensor

from gradsampler import _checks, reference


class Backend(Protocol):
    """The fused ops of one implementation; see `gradsampler.reference` for what they compute."""

    def step(self, *args: object) -> Tensor:
        """One affine stage with its injected noise."""


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
