# SPDX-License-Identifier: Apache-2.0
"""A velocity network under text and image guidance that may change from step to step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.program import Program, Recorder
from gradsampler.parameterization import Parameterization, Preconditioning
from gradsampler.solvers import Euler

STEADY_STEPS = 10  # guidance oscillates after these


@dataclass(frozen=True)
class Guidance:
    """How the outputs of the copies are weighed at each step."""

    copies: int
    text: Coefficient
    image: Coefficient | None
    text_osci: bool
    image_osci: bool

    def weights(self, i: int) -> tuple[Coefficient, ...]:
        """Weights of v_text, v_plain and v_plain - v_none at step i, as far as there are copies."""
        if self.copies == 1:
            return (1.0,)
        oscillates = i >= STEADY_STEPS and i % 2 == 1
        text = 1.0 if oscillates and self.text_osci else self.text
        if self.image is None:
            return text, 1 - text
        image = 1.0 if oscillates and self.image_osci else self.image
        return text, 1 - text, image - 1


class GuidedVelocity(Parameterization):
    """A velocity network called on copies of the state; the scales are in the coefficients.

    With a ramp r the image guidance at step i of N is ``1 + r (u_i - 1)``, where u_i goes evenly
    from the scale g to 1: ``u_i - 1 = (g - 1) (1 - i/N)``.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        levels: Tensor,  # [N+1]
        guidance: Guidance,
        ramp: Tensor | None,  # broadcasts to the state
    ) -> None:
        self.network = network
        self._copies = guidance.copies
        self._ramp = ramp
        self._weights: dict[float, tuple[Coefficient, ...]] = {}  # by time
        steps = len(levels) - 1
        for i, level in enumerate(levels[:-1].tolist()):
            weights = guidance.weights(i)
            if ramp is not None:
                weights = (*weights[:2], (1 - i / steps) * weights[2])
            self._weights[level] = weights

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        weights = self._weights[as_float(sigma)]
        return Preconditioning(1.0, tuple(-sigma * w for w in weights), 1.0, sigma)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        rows = torch.cat([x] * self._copies)
        v = self.network(img=rows, timesteps=noise.to(x.dtype).repeat(self._copies), **cond)
        name = "denoise: the model's output"
        _checks.shape(name, _checks.floating(name, v), rows.shape)
        if self._copies < 3:
            return v.chunk(self._copies)
        both, plain, none = v.chunk(3)
        contrast = plain - none
        return both, plain, contrast if self._ramp is None else self._ramp.to(v) * contrast


def euler(model: GuidedVelocity, levels: Tensor) -> Program:
    """Euler's method from the state itself, not from the state times the first level."""
    run = Recorder(model, len(levels) - 1)
    x = run.z0()
    for run.step, (s, t) in enumerate(pairwise(levels.unbind())):
        x = Euler().step(run, x, s, t)
    return run.finish(x)
