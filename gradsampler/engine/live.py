# SPDX-License-Identifier: Apache-2.0
"""A solver's steps carried out at once, where what they lead to decides what comes next."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.program import Affine, Denoised, Recorder, Slot
from gradsampler.noise.sources import NoiseSource
from gradsampler.parameterization import Parameterization


class Live(Recorder):
    """A `Recorder` that writes nothing down: it evaluates the model, without a gradient.

    Args:
        model: the denoiser.
        z0: [B, *state] of the state's dtype.
        noise: the injected noise; `step` counts the injections.
        cond: keyword arguments of the denoiser.
    """

    def __init__(
        self,
        model: Parameterization,
        z0: Tensor,
        noise: NoiseSource,
        cond: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, 1)
        self._z0, self._noise, self._cond = z0, noise, dict(cond or {})
        self._tensors: dict[Slot, Tensor] = {}

    def at(self, x: Tensor, sigma: Coefficient) -> tuple[Affine, Affine]:
        """A new state [B, *state] and what the model predicts there; those before are forgotten."""
        self._tensors.clear()
        self.predictions.clear()
        return self.denoise(self._slot("x", x), sigma)

    @torch.no_grad()
    def denoise(self, x: Affine, sigma: Coefficient) -> tuple[Affine, Affine]:
        state = self.value(x)
        level = torch.full((len(state),), as_float(sigma), dtype=torch.float64, device=state.device)
        found = self._model.at(self.step)(state, level, **self._cond)
        here, denoised = self._slot("x", state), self._slot("d", found)
        self.predictions.append(Denoised(sigma, denoised, here))
        return here, denoised

    @torch.no_grad()
    def value(self, x: Affine) -> Tensor:
        """The tensor that an expression stands for, [B, *state]."""
        total = torch.zeros_like(self._z0)
        for slot, c in x.terms.items():
            total = total + as_float(c) * self._tensors[slot]
        for (step, draw), c in x.noises.items():
            name = (step, step + 1, draw) if draw else (step, step + 1)
            total = total + as_float(c) * self._noise.at(self._z0, *name)
        return total

    def _slot(self, kind: str, x: Tensor) -> Affine:
        slot = Slot(kind, len(self._tensors))
        self._tensors[slot] = x
        return Affine({slot: 1.0})
