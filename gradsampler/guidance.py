# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: linear in the network's outputs, so it is in the coefficients."""

import copy
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradsampler import _checks, transforms
from gradsampler.batching import stacked
from gradsampler.coordinates import Coordinates
from gradsampler.elementary import Coefficient, as_float
from gradsampler.parameterization import (
    Network,
    Parameterization,
    Preconditioning,
    Prediction,
    by_value,
    checked_modules,
    parameterize,
)

__all__ = ["Guided"]

Scale = Coefficient | tuple[Coefficient, ...]  # one, or one a step


class Guided(Parameterization):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6).

    ``D = D(x; unconditional) + scale * (D(x; cond) - D(x; unconditional))``. This is linear in the
    predictions, so the scale becomes a coefficient of the run. With several conditions it is
    ``D(x; unconditional) + sum_k scale[k] * (D(x; cond, conditions[k]) - D(x; unconditional))``
    (Liu et al. 2022, arXiv 2206.01714, eq. 11). A prediction with weight 0 is not computed: with a
    scale of 1, and outside of the interval, there is one network call.

    Guidance that is not linear in the predictions (rescaling, APG, CFG-Zero*) is written as part of
    the network; docs/guidance.md shows how.

    Args:
        denoiser: a `Parameterization`, or a callable whose ``prediction`` the run is told.
        scale: guidance weight; 1 is the plain conditional model. A number, a 0-d tensor, or [N],
            one for each step; with ``conditions`` a list of these. Floating tensors receive their
            gradient.
        unconditional: entries that replace those of ``cond`` in the unconditional call: of the
            empty prompt, or of a negative one.
        batched: one network call on 2B samples in place of two on B. Entries that differ between
            the two predictions must then be tensors [B, ...] or [1, ...].
        interval: (low, high), the levels at which there is guidance (Kynkäänniemi et al. 2024,
            arXiv 2404.07724); at others the model is the conditional one, or the mean of several,
            each with its share of the sum of the scales.
        conditions: one dict for each condition, which replaces entries of ``cond`` in its call.
        modules: the nn.Modules behind a denoiser that is a plain callable.

    Example:
        >>> import torch, gradsampler as gs
        >>> denoiser = lambda x, sigma, label: 0.5 * x + label.view(-1, 1)
        >>> guided = gs.Guided(denoiser, 3.0, {"label": torch.zeros(1)}, batched=True)
        >>> gs.sample(guided, torch.zeros(2, 1), [2.0, 1.0], cond={"label": torch.tensor([1., 2.])})
        tensor([[1.5000],
                [3.0000]])
    """

    def __init__(
        self,
        denoiser: Parameterization | Network,
        scale: Coefficient | Sequence[Any],
        unconditional: Mapping[str, Any],
        batched: bool = False,
        interval: tuple[float, float] | None = None,
        *,
        conditions: Sequence[Mapping[str, Any]] | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.inner = parameterize(denoiser, "x0")
        self.network = self.inner.network
        if not isinstance(unconditional, Mapping):
            _checks.fail_type("Guided: unconditional", "be a dict", unconditional)
        self.unconditional = dict(unconditional)
        self.conditions = None if conditions is None else _conditions(conditions)
        self.scale = _scale("Guided: scale", scale) if conditions is None else _scales(scale)
        if self.conditions is not None and len(self._scales) != len(self.conditions):
            expected = f"hold one for each of the {len(self.conditions)} conditions"
            _checks.fail("Guided: scale", expected, len(self._scales))
        if not isinstance(batched, bool):
            _checks.fail_type("Guided: batched", "be True or False", batched)
        self.batched = batched
        self.interval = None if interval is None else _interval(interval)
        self.behind = checked_modules("Guided: modules", modules)

    @property
    def _scales(self) -> tuple[Scale, ...]:
        """A scale for each condition."""
        return (self.scale,) if self.conditions is None else self.scale  # type: ignore[return-value]

    @property
    def coordinates(self) -> Coordinates:
        return self.inner.coordinates

    @property
    def width(self) -> int:
        return (1 + len(self._scales)) * self.inner.width

    def reading(self, prediction: str) -> Parameterization:
        if not isinstance(self.inner, Prediction):
            return super().reading(prediction)
        return self._with(inner=Prediction(self.network, prediction))

    def on(self, sigmas: Tensor) -> "Guided":
        steps = len(sigmas) - 1
        for scale in self._scales:
            if isinstance(scale, tuple) and len(scale) != steps:
                _checks.fail("Guided: scale", f"hold one number a step, {steps}", len(scale))
        return self._with(inner=self.inner.on(sigmas))

    def at(self, step: int) -> "Guided":
        # A final denoising has the scale of the last step.
        scales = tuple(
            scale[min(step, len(scale) - 1)] if isinstance(scale, tuple) else scale
            for scale in self._scales
        )
        scale = scales[0] if self.conditions is None else scales
        return self._with(inner=self.inner.at(step), scale=scale)

    def described(self) -> Hashable | None:
        inner = by_value(self.inner)
        numbers = pytree.tree_leaves(self.scale)
        if inner is None or any(isinstance(x, Tensor) for x in numbers):
            return None
        return Guided, inner, self._scales, self.interval

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return self._guided(self.inner.preconditioning(sigma), sigma)

    def limit(self) -> Preconditioning:
        return self._guided(self.inner.limit(), math.inf)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return self.chosen(x, noise, cond, range(self.width))

    def chosen(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Any], branches: Sequence[int]
    ) -> tuple[Tensor, ...]:
        width = self.inner.width
        changes = [self.unconditional, *([{}] if self.conditions is None else self.conditions)]
        groups: dict[int, list[int]] = {}
        for b in branches:
            groups.setdefault(b // width, []).append(b % width)
        given = {k: {**cond, **changes[k]} for k in groups}
        if not self.batched or len(groups) == 1:
            found = [self.inner.chosen(x, noise, given[k], groups[k]) for k in groups]
            return tuple(output for outputs in found for output in outputs)
        count, wanted = len(groups), sorted({b for inner in groups.values() for b in inner})
        rows, levels = torch.cat([x] * count), torch.cat([noise] * count)
        whole = self.inner.chosen(rows, levels, stacked(list(given.values()), len(x)), wanted)
        parts = {b: output.chunk(count) for b, output in zip(wanted, whole, strict=True)}
        return tuple(parts[b][i] for i, inner in enumerate(groups.values()) for b in inner)

    def modules(self) -> Iterator[nn.Module]:
        yield from self.inner.modules()
        yield from self.behind

    def _with(self, **changes: Any) -> "Guided":
        changed = copy.copy(self)
        vars(changed).update(changes)
        return changed

    def _guided(self, inner: Preconditioning, sigma: Coefficient) -> Preconditioning:
        weights = self._weights(sigma)
        nothing = (0.0,) * len(inner.c_out)
        count = 1 + len(weights)
        c_out = tuple((1 - sum(weights)) * c for c in inner.c_out)
        for weight in weights:
            c_out += tuple(weight * c for c in inner.c_out)
        branches = [(*nothing * k, *inner.c_out, *nothing * (count - 1 - k)) for k in range(count)]
        return inner._replace(c_out=c_out, branches=tuple(branches))

    def _weights(self, sigma: Coefficient) -> list[Coefficient]:
        """Of the conditions, at a level, or at levels [B]."""
        scales: list[Coefficient] = []
        for scale in self._scales:
            if isinstance(scale, tuple):
                _checks.fail("Guided: scale", "be one number outside of a run", f"[{len(scale)}]")
            scales.append(scale)
        if self.interval is None:
            return scales
        total, (low, high) = sum(scales), self.interval
        if len(scales) > 1 and total == 0:
            hint = "outside of an interval each condition has its share of the sum"
            _checks.fail("Guided: scale", "not add up to 0 where interval is given", total, hint)
        outside: list[Coefficient] = [1.0]
        if len(scales) > 1:
            outside = [scale / total for scale in scales]
        if isinstance(sigma, Tensor) and sigma.ndim:
            inside = (sigma >= low) & (sigma <= high)
            return [
                torch.where(inside, torch.as_tensor(a, dtype=sigma.dtype), b)
                for a, b in zip(scales, outside, strict=True)
            ]
        return scales if low <= as_float(sigma) <= high else outside


def _conditions(conditions: object) -> tuple[dict[str, Any], ...]:
    if isinstance(conditions, (str, Mapping)) or not isinstance(conditions, Sequence):
        _checks.fail_type("Guided: conditions", "be a list of dicts", conditions)
    for k, each in enumerate(conditions):
        if not isinstance(each, Mapping):
            _checks.fail_type(f"Guided: conditions[{k}]", "be a dict", each)
    if not conditions:
        _checks.fail("Guided: conditions", "hold a dict at least", conditions)
    return tuple(dict(each) for each in conditions)


def _scales(scales: object) -> tuple[Scale, ...]:
    """A guidance weight for each condition."""
    if isinstance(scales, (str, Tensor)) or not isinstance(scales, Sequence):
        _checks.fail_type("Guided: scale", "be a list, one for each condition", scales)
    return tuple(_scale(f"Guided: scale[{k}]", each) for k, each in enumerate(scales))


def _scale(name: str, scale: object) -> Scale:
    """A guidance weight, or one a step."""
    if isinstance(scale, Sequence) and not isinstance(scale, str):
        return tuple(_checks.finite(f"{name}[{k}]", c) for k, c in enumerate(scale))
    if not isinstance(scale, Tensor):
        return _checks.finite(name, scale)
    if _checks.floating(name, _checks.unmapped(name, scale)).ndim > 1:
        _checks.fail(name, "have shape [] or [N], one a step", list(scale.shape))
    scale = scale.to("cpu", torch.float64)
    if scale.ndim == 0:
        return scale
    return scale.unbind() if transforms.followed(scale) else tuple(scale.tolist())


def _interval(interval: object) -> tuple[float, float]:
    if not isinstance(interval, Sequence) or len(interval) != 2:
        _checks.fail_type("Guided: interval", "be a pair (low, high) of levels, or None", interval)
    low, high = interval
    low = _checks.finite("Guided: interval[0]", low)
    high = high if high == math.inf else _checks.finite("Guided: interval[1]", high)
    if not low <= high:
        _checks.fail("Guided: interval", "be (low, high) with low <= high", interval)
    return low, high
