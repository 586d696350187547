# SPDX-License-Identifier: Apache-2.0
"""Noise from samplers and generators that are not ours."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.noise.sources import Cotangent, Injected, NoiseSource
from gradsampler.repetition import RandomState, ReplayError

_LOOKED_AT = 256  # elements of a noise by which it is known again


class _First(NamedTuple):
    """What is remembered of the first time that a noise was drawn."""

    before: RandomState
    elements: Tensor


class Replayed(NoiseSource):
    """Noise that your function draws, called once for each injection, when the run comes to it.

    So the draws have the order of a plain loop. If a run needs a noise again, for the gradient to
    the levels or for states that are recomputed, the generators are set back to their state before
    that draw, the function is called again, and its result is compared with the first one. No
    gradient reaches the noise.

    Args:
        draw: called as draw(z0, step, number) with z0 [B, *state] in the dtype of the state, the
            step and the number of the noise in that step; returns [B, *state] of any floating
            dtype, on z0's device.
        generators: those it draws from, other than torch's default ones.
        keep: stores the noises instead of drawing them again, one tensor of the state's size for
            each injection. For functions that do not depend on generators only, such as one that
            reads from a list.

    Raises:
        ValueError: in the run, if the noise has another shape or requires grad.
        ReplayError: in backward, if the function returns something else than the first time.

    Example:
        >>> import torch, gradsampler as gs
        >>> generator = torch.Generator().manual_seed(0)
        >>> def draw(z0, step, number):
        ...     return torch.randn(z0.shape, dtype=z0.dtype, generator=generator)
        >>> noise = gs.noise.Replayed(draw, generators=[generator])
        >>> z0 = torch.randn(1, 3, requires_grad=True)
        >>> levels = torch.tensor([9.0, 3.0, 1.0], requires_grad=True)
        >>> x = gs.sample(lambda x, s: x / 2, z0, levels, solver="euler_ancestral", noise=noise)
        >>> torch.autograd.grad(x.sum(), levels)[0].isfinite().all()
        tensor(True)
    """

    def __init__(
        self,
        draw: Callable[[Tensor, int, int], Tensor],
        *,
        generators: Sequence[torch.Generator] = (),
        keep: bool = False,
    ) -> None:
        if not callable(draw):
            _checks.fail_type("Replayed: draw", "be callable as draw(z0, step, number)", draw)
        for generator in generators:
            if not isinstance(generator, torch.Generator):
                _checks.fail_type("Replayed: generators", "be torch.Generators", generator)
        self._draw, self._generators, self._keep = draw, tuple(generators), bool(keep)
        self._run: dict[Injected, _First | Tensor] | None = None  # None outside of a run
        self._graph = False  # whether the run is under grad mode

    def __repr__(self) -> str:
        return f"Replayed({getattr(self._draw, '__name__', repr(self._draw))})"

    @property
    def of_z0(self) -> bool:
        return False

    def identity(self) -> Any:
        way_out = "take noise.Philox, or noise.Given with the tensors"
        _checks.fail("noise", "be the same in another process for a checkpoint", self, way_out)

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> "Replayed":
        if self._run is not None:
            return self
        fitted = copy.copy(self)
        fitted._run, fitted._graph = {}, torch.is_grad_enabled()
        return fitted

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        name, z0 = (step, draw), z0.detach()
        if self._run is None:
            return self._drawn(z0, *name)
        first = self._run.get(name)
        if isinstance(first, Tensor):
            return first.to(z0.dtype)
        now = RandomState(z0.device, generators=self._generators)
        if first is None:
            noise = self._drawn(z0, *name)
            self._run[name] = noise if self._keep else _First(now, _elements(noise))
            return noise
        first.before.restore()
        try:
            noise = self._drawn(z0, *name)
        finally:
            now.restore()
        if not torch.equal(_elements(noise), first.elements):
            raise ReplayError(
                f"noise={self!r} must draw the same again from the same state of its generators, "
                f"got another noise at step {step}; name the generators that it draws from, "
                "generators=[...], or have what is drawn kept, keep=True"
            )
        return noise

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        return Cotangent(None, {})

    def _drawn(self, z0: Tensor, step: int, number: int) -> Tensor:
        with torch.set_grad_enabled(self._graph):
            noise = self._draw(z0, step, number)
        name = f"noise=Replayed: what draw returns at step {step}"
        noise = _checks.shape(name, _checks.floating(name, noise), z0.shape)
        if noise.requires_grad:
            way_out = "noise that learns is noise.Given, or a NoiseSource of your own"
            _checks.fail(name, "not require grad", "a tensor that does", way_out)
        return noise.to(z0.dtype)


def _elements(noise: Tensor) -> Tensor:
    flat = noise.reshape(-1)
    return flat[:: max(1, len(flat) // _LOOKED_AT)].clone()
