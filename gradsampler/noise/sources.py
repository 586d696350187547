# SPDX-License-Identifier: Apache-2.0
"""Step noises: what a sampler injects at step i of N, as a function of the initial noise z0.

Each source defines its noise by ``at``, in plain torch and differentiable; that definition is what
every kernel is tested against. ``transpose`` is the product of a cotangent with the transposed
Jacobian, in closed form, so that no step noise is ever stored.

A step may draw several noises. Each is named by its step and by its number in that step, which is 0
for the first; the draws of a step are independent of one another where those of two steps are.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks, transforms
from gradsampler.contract import GIVEN, OFF, SIGNED_ROLL, SINCOS, Draw
from gradsampler.elementary import as_float
from gradsampler.noise import philox

__all__ = ["Given", "Mixture", "NoiseSource", "Off", "Philox", "SignedRoll", "SinCos"]


Injected = tuple[int, int]  # what names a noise: its step, and its number in that step


class Cotangent(NamedTuple):
    """Where the cotangent of a step noise goes."""

    z0: Tensor | None  # [B, *state], or None where the noise does not depend on z0
    tensors: dict[int, Tensor]  # by position in NoiseSource.tensors


GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # its multiples fill the circle evenly and never repeat


class NoiseSource(ABC):
    """A family of step noises n_i(z0), i = 0 .. N-1, each standard normal or meant to be."""

    @property
    def of_z0(self) -> bool:
        """Whether the noise is a function of z0, so that a gradient to it is to be expected."""
        return True

    @property
    def needs_length(self) -> bool:
        """Whether the noise depends on how many steps the run has."""
        return False

    @property
    def normal(self) -> bool:
        """Whether the noise is standard normal where z0 is, as a right sample needs it."""
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the caller that the noise is made of and that its gradient reaches."""
        return ()

    @abstractmethod
    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        """The noise number ``draw`` of step ``step`` out of ``num_steps``.

        A source of your own may leave ``draw`` out; it then serves the solvers that draw once a
        step, which call it without.

        Args:
            z0: [B, *state] initial noise, standard normal.
            step: absolute step index, 0 <= step < num_steps.
            num_steps: number of steps of the run.
            draw: which of the step's noises, 0 for the first.

        Returns:
            [B, *state] of z0's dtype and device, differentiable in z0.
        """

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        """Pulls the cotangent ``g`` [B, *state] of ``at(z0, step, num_steps, draw)`` back.

        A source of your own needs only ``at``: this default differentiates it.
        """
        with torch.enable_grad():
            z0 = z0.detach().requires_grad_()
            noise = self.at(z0, *name_of(step, num_steps, draw))
        if not noise.requires_grad:
            return Cotangent(None, {})
        wanted = [k for k, x in enumerate(self.tensors) if x.requires_grad]
        inputs = [z0, *(self.tensors[k] for k in wanted)]
        dz0, *rest = torch.autograd.grad(noise, inputs, g.to(noise.dtype), allow_unused=True)
        found = zip(wanted, rest, strict=True)
        return Cotangent(dz0, {k: x for k, x in found if x is not None})

    def identity(self) -> Any:
        """What makes this the same source in another process, for the checkpoint of `optimize`.

        Plain values and tensors, alone or in lists, tuples and dicts. A dataclass has it for free,
        by its fields; a source of your own that is none returns, say, ``{"seed": self.seed}``.
        """
        own = "__dataclass_fields__" in vars(type(self))
        names: list[str] = [f.name for f in fields(self)] if is_dataclass(self) else []
        if not own and (not names or vars(self).keys() - names):
            _checks.fail_type(
                "noise",
                'have a method identity() that returns what makes it this source, as {"seed": '
                "self.seed}, or be a dataclass, for the checkpoint to be of this run",
                self,
            )
        return {name: getattr(self, name) for name in names}

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> "NoiseSource":
        """Checks the source against the noises that a run injects, in order, and fits it."""
        twice = next((step for step, draw in injected if draw > 0), None)
        if twice is not None and not _numbered(self.at):
            _checks.fail(
                f"noise={type(self).__name__}: at",
                f"take draw=, as this run draws more than one noise at step {twice}",
                f"at{inspect.signature(self.at)}",
                "define at(z0, step, num_steps, draw=0)",
            )
        return self

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        """The injection as numbers for a kernel; None for a source that no kernel knows."""
        return None


@dataclass(frozen=True)
class Off(NoiseSource):
    """No noise: nothing is injected, not even by a stochastic solver."""

    @property
    def of_z0(self) -> bool:
        return False

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        return torch.zeros_like(z0)

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        return Cotangent(None, {})

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        return Draw(OFF, philox.counter(step, draw))


@dataclass(frozen=True)
class SinCos(NoiseSource):
    """Learnable step noise of sines and cosines of z0.

    ``n_i = z0 (1 + g i/N) + a sin(z0 r i + i) + b cos(z0 r i)``

    For draw k of a step, the phase of both waves is shifted by k golden angles, pi (3 - sqrt 5).

    The noises are almost equal to z0 and so to one another. They add up in amplitude, where
    variances of independent noises add up, and samples come out several times too wide. For correct
    samples choose ``SignedRoll``.

    Args:
        scale_gain, phase_rate, sin_amp, cos_amp: g, r, a and b, numbers or 0-d tensors, which
            receive their gradient.
    """

    scale_gain: float | Tensor = 0.1  # g
    phase_rate: float | Tensor = 0.1  # r
    sin_amp: float | Tensor = 0.1  # a
    cos_amp: float | Tensor = 0.05  # b

    def __post_init__(self) -> None:
        for name in ("scale_gain", "phase_rate", "sin_amp", "cos_amp"):
            number = _checks.coefficient(f"SinCos: {name}", getattr(self, name))
            object.__setattr__(self, name, number)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        numbers = (self.scale_gain, self.phase_rate, self.sin_amp, self.cos_amp)
        return tuple(x for x in numbers if isinstance(x, Tensor))

    @property
    def needs_length(self) -> bool:
        return bool(self.scale_gain != 0)

    @property
    def normal(self) -> bool:
        return False

    @property
    def _learned(self) -> bool:
        return any(map(transforms.followed, self.tensors))

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        z = _widened(z0)
        phase = z * (self.phase_rate * step) + GOLDEN_ANGLE * draw
        wave = self.sin_amp * torch.sin(phase + step) + self.cos_amp * torch.cos(phase)
        return (z * (1 + self.scale_gain * step / num_steps) + wave).to(z0.dtype)

    def wave(self, step: int, num_steps: int, draw: int = 0) -> tuple[float, float, float, float]:
        """(k, p, R, phi) with ``n_i = k z0 + R sin(p z0 + phi)``: both waves as one."""
        sine = as_float(self.sin_amp) * math.cos(step)
        cosine = as_float(self.sin_amp) * math.sin(step) + as_float(self.cos_amp)
        gain = 1 + as_float(self.scale_gain) * step / num_steps
        rate = as_float(self.phase_rate) * step
        phase = math.atan2(cosine, sine) + GOLDEN_ANGLE * draw
        return gain, rate, math.hypot(sine, cosine), phase

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        if self._learned:
            return super().transpose(g, z0, step, num_steps, draw)
        gain, rate, amplitude, phase = self.wave(step, num_steps, draw)
        slope = torch.cos(rate * _widened(z0) + phase).mul_(rate * amplitude).add_(gain)
        return Cotangent(slope.mul_(g).to(g.dtype), {})

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        if self._learned:
            return None  # no kernel has a gradient to the numbers
        gain, rate, amplitude, phase = self.wave(step, num_steps, draw)
        counter = philox.counter(step, draw)
        return Draw(SINCOS, counter, gain=gain, rate=rate, amplitude=amplitude, phase=phase)


@dataclass(frozen=True)
class SignedRoll(NoiseSource):
    """z0 rolled by a random offset and multiplied by random signs, anew at each step.

    ``n_i = e_i * roll(z0, o_i)`` within each sample, flattened: an orthogonal map of z0, so exactly
    N(0, I), uncorrelated with z0 and with the other steps, and differentiable. At every step the
    noise of a sample has exactly the norm of its z0. This matters only for tiny states: there, take
    a ``Mixture``.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        _check_seed("SignedRoll", self.seed)

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        counter = philox.counter(step, draw)
        offset = philox.offset(z0[0].numel(), counter, self.seed)
        return signed_roll(z0, self.seed, counter, offset)

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        counter = philox.counter(step, draw)
        offset = philox.offset(z0[0].numel(), counter, self.seed)
        return Cotangent(signed_roll_transpose(g, self.seed, counter, offset), {})

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> NoiseSource:
        if z0[0].numel() < 2:
            _checks.fail("noise=SignedRoll: z0", "hold at least 2 elements a sample", z0[0].numel())
        return self

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        counter = philox.counter(step, draw)
        shift = philox.offset(z0[0].numel(), counter, self.seed)
        return Draw(SIGNED_ROLL, counter, seed=self.seed, offset=shift)


@dataclass(frozen=True)
class Philox(NoiseSource):
    """Independent standard normal noise from (seed, step, draw, global element index).

    It carries no gradient to z0. The same call gives the same noise, so backward regenerates it.

    Args:
        seed: 0 to 2^64 - 1.
        consistent: makes the noises of a run increments of one Brownian path, with the step's index
            as its time. A run with twice the steps refines the path: two of its noises sum to
            sqrt(2) times the corresponding noise of the coarser run. For schedules that are a
            function of i/N, such as `schedules.karras`.
    """

    seed: int = 0
    consistent: bool = False
    _draws: ClassVar[int] = 1  # of each step; a run sets it, as a step's noises are its parts

    def __post_init__(self) -> None:
        _check_seed("Philox", self.seed)

    @property
    def of_z0(self) -> bool:
        return False

    @property
    def needs_length(self) -> bool:
        return self.consistent

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        if not self.consistent:
            return self._normal(z0, philox.counter(step, draw))
        terms = self._increments(step, num_steps, draw)
        return sum((weight * self._normal(z0, n) for n, weight in terms), torch.zeros_like(z0))

    def _normal(self, z0: Tensor, counter: int) -> Tensor:
        return philox.normals(z0.numel(), counter, self.seed, z0.dtype, z0.device).view(z0.shape)

    def _increments(self, step: int, num_steps: int, draw: int) -> list[tuple[int, float]]:
        """The noise as numbered normals and their weights.

        Lévy's construction: the increments over an odd number of intervals are normals of their
        own, and each is halved as often as there are factors of 2, by adding a normal to one half
        and subtracting it from the other.
        """
        if draw >= self._draws:
            _checks.fail("Philox: draw", f"be below {self._draws}, a step's number of draws", draw)
        place, count = step * self._draws + draw, num_steps * self._draws
        terms, weight = [], 1.0
        while count % 2 == 0:
            place, second, count = place // 2, place % 2, count // 2
            weight *= math.sqrt(0.5)
            terms.append((count + place, -weight if second else weight))
        return [(place, weight), *terms]

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        return Cotangent(None, {})

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> NoiseSource:
        if not self.consistent:
            return self
        fitted = Philox(self.seed, consistent=True)
        object.__setattr__(fitted, "_draws", max((draw + 1 for _, draw in injected), default=1))
        return fitted

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        if self.consistent:
            return None  # several normals
        return Draw(OFF, philox.counter(step, draw), normal=1.0, normal_seed=self.seed)


@dataclass(frozen=True)
class Mixture(NoiseSource):
    """``cos(angle) * Philox(seed) + sin(angle) * other``: between independent noise and ``other``.

    It has unit variance if ``other`` has.
    """

    other: NoiseSource
    angle: float  # radians
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.other, NoiseSource):
            _checks.fail_type("Mixture: other", "be a gradsampler.noise object", self.other)
        if isinstance(self.other, (Philox, Mixture)):
            # With equal seeds the two parts would be one and the same normal.
            _checks.fail("Mixture: other", "not be independent noise itself", repr(self.other))
        _checks.finite("Mixture: angle", self.angle)
        _check_seed("Mixture", self.seed)

    @property
    def of_z0(self) -> bool:
        return self.other.of_z0

    @property
    def needs_length(self) -> bool:
        return self.other.needs_length

    @property
    def normal(self) -> bool:
        return self.other.normal

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.other.tensors

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        independent = Philox(self.seed).at(z0, step, num_steps, draw)
        other = self.other.at(z0, *name_of(step, num_steps, draw))
        return math.cos(self.angle) * independent + math.sin(self.angle) * other

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        pulled = math.sin(self.angle) * g
        return self.other.transpose(pulled, z0, *name_of(step, num_steps, draw))

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> NoiseSource:
        return Mixture(self.other.prepare(z0, injected), self.angle, self.seed)

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        other = self.other.draw(z0, *name_of(step, num_steps, draw))
        if other is None:
            return None
        return other._replace(
            weight=math.sin(self.angle) * other.weight,
            normal=math.cos(self.angle),
            normal_seed=self.seed,
        )


class Given(NoiseSource):
    """The caller's own tensors, one for each injection, in the order of injection.

    They are inputs of the run, and each tensor gets its gradient. A run takes the tensors in
    the order in which its noises are first injected; outside a run the step index is the position.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            _checks.fail_type("Given: tensors", "be a list of tensors", tensors)
        checked = [_checks.floating(f"Given: tensors[{k}]", x) for k, x in enumerate(tensors)]
        self._tensors = tuple(map(_checks.savable, checked))
        self._position: dict[Injected, int] = {(k, 0): k for k in range(len(tensors))}

    def _at(self, step: int, draw: int) -> int:
        if (step, draw) not in self._position:
            steps = sorted({step for step, _ in self._position})
            got = f"draw {draw} of step {step}" if step in steps else step
            _checks.fail("Given: step", f"be one of {steps}", got)
        return self._position[step, draw]

    @property
    def of_z0(self) -> bool:
        return False

    def identity(self) -> Any:
        return {"tensors": self._tensors}

    def __repr__(self) -> str:
        return f"Given({len(self._tensors)} tensors)"

    @property
    def needs_length(self) -> bool:
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._tensors

    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        return self._tensors[self._at(step, draw)].to(z0.dtype)

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        position = self._at(step, draw)
        return Cotangent(None, {position: g.to(self._tensors[position].dtype)})

    def prepare(self, z0: Tensor, injected: Sequence[Injected]) -> NoiseSource:
        if len(self._tensors) != len(injected):
            _checks.fail(
                "noise=Given: tensors",
                f"hold one tensor for each of the {len(injected)} injections of this run",
                len(self._tensors),
            )
        for k, x in enumerate(self._tensors):
            _checks.shape(f"noise=Given: tensors[{k}]", x, z0.shape)
            _checks.device(f"noise=Given: tensors[{k}]", x, z0.device)
        fitted = Given(self._tensors)
        fitted._position = {noise: k for k, noise in enumerate(injected)}
        return fitted

    def draw(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Draw | None:
        given = self._tensors[self._at(step, draw)]
        return Draw(GIVEN, philox.counter(step, draw), given=given)


def name_of(step: int, num_steps: int, draw: int) -> tuple[int, ...]:
    """What a source's methods are called with; the first draw of a step is named by the step."""
    return (step, num_steps, draw) if draw else (step, num_steps)


def draw_of(
    source: NoiseSource, z0: Tensor, step: int, num_steps: int, draw: int, dtype: torch.dtype
) -> Draw:
    """One injection as numbers; a source that no kernel knows is evaluated in ``dtype``."""
    name = name_of(step, num_steps, draw)
    numbers = source.draw(z0, *name)
    if numbers is None:
        given = _checked(source, source.at(z0.to(dtype), *name), z0, step)
        return Draw(GIVEN, philox.counter(step, draw), given=given)
    return numbers


def _checked(source: NoiseSource, noise: object, z0: Tensor, step: int) -> Tensor:
    """The noise of a source of the user's own, if it fits; the same on every backend."""
    name = f"noise={type(source).__name__}: what at returns at step {step}"
    given = _checks.shape(name, _checks.floating(name, noise), z0.shape)
    return _checks.device(name, given, z0.device)


def signed_roll(z0: Tensor, seed: int, step: int, offset: int) -> Tensor:
    """z0 [B, *state] with each sample rolled by ``offset``, then multiplied by random signs."""
    flat = z0.flatten(1)
    signs = philox.signs(len(flat), flat.shape[1], step, seed, z0.device).to(z0.dtype)
    return (signs * flat.roll(offset, dims=1)).view(z0.shape)


def signed_roll_transpose(g: Tensor, seed: int, step: int, offset: int) -> Tensor:
    """The transpose of `signed_roll`, which is its inverse: signs first, then rolled back."""
    flat = g.flatten(1)
    signs = philox.signs(len(flat), flat.shape[1], step, seed, g.device).to(g.dtype)
    return (signs * flat).roll(-offset, dims=1).view(g.shape)


def _numbered(at: Callable[..., Tensor]) -> bool:
    parameters = inspect.signature(at).parameters.values()
    return len(parameters) > 3 or any(p.kind == p.VAR_POSITIONAL for p in parameters)


def _widened(x: Tensor) -> Tensor:
    # The argument of the sine reaches hundreds: 16 bits would leave no digit of its phase.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_seed(owner: str, seed: object) -> None:
    if _checks.integer(f"{owner}: seed", seed, 0) >= 2**64:
        _checks.fail(f"{owner}: seed", "be below 2**64", seed)
