# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: linear in the network's outputs, so it is in the coefficients."""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.coordinates import Coordinates
from gradsampler.elementary import Coefficient
from gradsampler.parameterization import (
    Network,
    Parameterization,
    Preconditioning,
    by_value,
    checked_modules,
    parameterize,
)

__all__ = ["Guided"]

Scale = Coefficient | Sequence[float]


class Guided(Parameterization):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6), linear as well.

    ``D = D(x; unconditional) + scale * (D(x; cond) - D(x; unconditional))``: two network calls an
    evaluation, two output slots, and the scale in the coefficients.

    Args:
        denoiser: a `Parameterization`, or a callable that predicts x0.
        scale: guidance weight; 1 is the plain conditional model. A number, a 0-d tensor, or [N],
            one a step. Floating tensors receive their gradient.
        unconditional: what replaces the entries of ``cond`` in the unconditional call.
        modules: the nn.Modules behind a denoiser that is a plain callable.
    """

    def __init__(
        self,
        denoiser: Parameterization | Network,
        scale: Scale,
        unconditional: Mapping[str, Any],
        *,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.inner = parameterize(denoiser, "x0")
        self.network = self.inner.network
        self.scale = _scale(scale)
        if not isinstance(unconditional, Mapping):
            _checks.fail_type("Guided: unconditional", "be a dict", unconditional)
        self.unconditional = dict(unconditional)
        self.behind = checked_modules("Guided: modules", modules)

    @property
    def coordinates(self) -> Coordinates:
        return self.inner.coordinates

    def on(self, sigmas: Tensor) -> "Guided":
        steps = len(sigmas) - 1
        if isinstance(self.scale, Tensor) and self.scale.ndim == 1 and len(self.scale) != steps:
            _checks.fail("Guided: scale", f"hold one number a step, {steps}", len(self.scale))
        return self._with(inner=self.inner.on(sigmas))

    def at(self, step: int) -> "Guided":
        scale = self.scale
        if isinstance(scale, Tensor) and scale.ndim == 1:
            scale = scale[min(step, len(scale) - 1)]  # a final denoising has that of the last step
        return self._with(inner=self.inner.at(step), scale=scale)

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return self._guided(self.inner.preconditioning(sigma))

    def described(self) -> Hashable | None:
        inner = by_value(self.inner)
        return None if inner is None or isinstance(self.scale, Tensor) else (inner, self.scale)

    def limit(self) -> Preconditioning:
        return self._guided(self.inner.limit())

    @property
    def width(self) -> int:
        return 2 * self.inner.width

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return self.chosen(x, noise, cond, range(self.width))

    def chosen(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Any], branches: Sequence[int]
    ) -> tuple[Tensor, ...]:
        width = self.inner.width
        found: list[Tensor] = []
        for k, given in enumerate(({**cond, **self.unconditional}, cond)):
            wanted = [b - k * width for b in branches if b // width == k]
            if wanted:
                found += self.inner.chosen(x, noise, given, wanted)
        return tuple(found)

    def modules(self) -> Iterator[nn.Module]:
        yield from self.inner.modules()
        yield from self.behind

    def _with(self, **changes: Any) -> "Guided":
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed

    def _guided(self, inner: Preconditioning) -> Preconditioning:
        scale = self.scale
        if isinstance(scale, Tensor) and scale.ndim == 1:
            _checks.fail("Guided: scale", "be one number outside of a run", f"[{len(scale)}]")
        nothing = (0.0,) * len(inner.c_out)
        plain = tuple((1 - scale) * c for c in inner.c_out)
        return inner._replace(
            c_out=plain + tuple(scale * c for c in inner.c_out),
            branches=(inner.c_out + nothing, nothing + inner.c_out),
        )


def _scale(scale: object) -> Coefficient:
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        numbers = [_checks.finite(f"Guided: scale[{k}]", c) for k, c in enumerate(scale)]
        return torch.tensor(numbers, dtype=torch.float64)
    if not isinstance(scale, Tensor):
        return _checks.finite("Guided: scale", scale)
    if _checks.floating("Guided: scale", scale).ndim > 1:
        _checks.fail("Guided: scale", "have shape [] or [N], one a step", list(scale.shape))
    return scale.to("cpu", torch.float64)
