# SPDX-License-Identifier: Apache-2.0
"""Noise samplers: functions of two levels, as k-diffusion has them, and sources of noise."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine, Recorder
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import NoiseSource
from gradsampler.solvers import Churn

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Between = Callable[[int, int], tuple[Tensor, Tensor]]  # step, number -> the levels of a noise


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """A noise sampler that draws ``torch.randn_like(x)``, whatever the levels."""
    return lambda sigma, sigma_next: torch.randn_like(x)


class BatchedBrownianTree:
    """torchsde's BrownianTree, or one for each sample.

    Args:
        x: [B, *state] what the increments are like.
        t0, t1: the ends of the path, in either order.
        seed: a number, or one for each sample; None draws one from torch's default generator.
        kwargs: further arguments of the trees.

    Raises:
        ImportError: torchsde is not installed.
    """

    def __init__(
        self,
        x: Tensor,
        t0: Tensor,
        t1: Tensor,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        trees = _torchsde()
        t0, t1, self.sign = self.sort(t0, t1)
        w0 = kwargs.pop("w0", torch.zeros_like(x))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        self.batched = isinstance(seed, Sequence)
        seeds: Sequence[int] = seed if isinstance(seed, Sequence) else [seed]
        if self.batched:
            if len(seeds) != len(x):
                _checks.fail("seed", f"be a number, or one for each of {len(x)} samples", seeds)
            w0 = w0[0]
        self.trees = [trees.BrownianTree(t0, w0, t1, entropy=each, **kwargs) for each in seeds]

    @staticmethod
    def sort(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
        """The two in ascending order, and the sign of their exchange."""
        return (a, b, 1) if a < b else (b, a, -1)

    def __call__(self, t0: Tensor, t1: Tensor) -> Tensor:
        """The increment of the path from t0 to t1, [B, *state]."""
        t0, t1, sign = self.sort(t0, t1)
        w = torch.stack([tree(t0, t1) for tree in self.trees]) * (self.sign * sign)
        return w if self.batched else w[0]


class BrownianTreeNoiseSampler:
    """A noise sampler whose noises are the increments of one Brownian path.

    Args:
        x: [B, *state] what the noises are like.
        sigma_min, sigma_max: the ends of the path.
        seed: as for `BatchedBrownianTree`.
        transform: from a level to the time of the path.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: Coefficient,
        sigma_max: Coefficient,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.transform = transform
        t0, t1 = (transform(torch.as_tensor(s)).detach() for s in (sigma_min, sigma_max))
        self.tree = BatchedBrownianTree(x.detach(), t0, t1, seed)

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Standard normal noise for the step between two levels, [B, *state]."""
        t0, t1 = self.transform(torch.as_tensor(sigma)), self.transform(torch.as_tensor(sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()


def path(x: Tensor, sigmas: Tensor) -> BrownianTreeNoiseSampler:
    """The noise of the SDE samplers where none is given: a Brownian tree with a random seed."""
    sigmas = _checks.floating("sigmas", sigmas).detach()
    if sigmas.ndim != 1:
        way_out = "one tree has one time for all samples; take gradsampler.noise.SignedRoll()"
        _checks.fail("noise_sampler", "be given where levels are [N+1, B]", None, way_out)
    return BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max())


def source(
    noise_sampler: NoiseSource | NoiseSampler | None, x: Tensor, between: Between
) -> NoiseSource:
    """What a run injects.

    Args:
        noise_sampler: a source as it is; a function, called for each noise once, in order; or None
            for the draws of ``torch.randn_like``.
        x: [B, *state] what drawn noise is like.
        between: the levels that a function is called with.
    """
    if isinstance(noise_sampler, NoiseSource):
        return noise_sampler
    if noise_sampler is None:
        like = x.detach()
        return Replayed(lambda z0, step, number: torch.randn_like(like))
    if not callable(noise_sampler):
        expected = "be callable as noise_sampler(sigma, sigma_next), a gradsampler.noise object"
        _checks.fail_type("noise_sampler", f"{expected} or None", noise_sampler)
    sampler = noise_sampler
    # A tree gives the same for the same levels. Nothing is known of another function, so what it
    # returns is kept.
    keep = not isinstance(sampler, BrownianTreeNoiseSampler)
    drawn = Replayed(lambda z0, step, number: sampler(*between(step, number)), keep=keep)
    return drawn.prepare(x, ())


def steps(sigmas: Tensor) -> Between:
    """One noise a step, between its levels."""
    levels = sigmas.detach()
    return lambda step, number: (levels[step], levels[step + 1])


def shares(sigmas: Tensor, *inner: float, from_start: bool = False) -> Between:
    """A noise up to each share of a step in log sigma, and one up to its end.

    Each begins where the one before ended or, if ``from_start``, where the step does.
    """
    levels = sigmas.detach()

    def between(step: int, number: int) -> tuple[Tensor, Tensor]:
        t, t_next = -levels[step].log(), -levels[step + 1].log()
        found = [(-(t + share * (t_next - t))).exp() for share in (0.0, *inner, 1.0)]
        return found[0 if from_start else number], found[number + 1]

    return between


class EveryStep(Churn):
    """Churn that draws a noise in each step, also where it injects none, as k-diffusion does.

    So a run from the same seed draws the same.
    """

    def raised(self, run: Recorder, sigma: Coefficient) -> tuple[Affine, Coefficient]:
        noise, level = super().raised(run, sigma)
        return (noise if noise.noises else 0.0 * run.noise()), level


def churn(
    sigmas: Tensor,
    s_churn: Coefficient,
    s_tmin: float,
    s_tmax: float,
    s_noise: Coefficient,
    noise_sampler: NoiseSource | NoiseSampler | None,
) -> Churn | None:
    """The churn of a run; None where it raises no level."""
    if not s_churn > 0:
        return None
    # Levels are compared with the bounds in their own dtype.
    low, high = (torch.tensor(bound, dtype=sigmas.dtype).item() for bound in (s_tmin, s_tmax))
    if not high >= low:
        return None
    kind: Callable[..., Churn] = EveryStep if noise_sampler is None else Churn
    return kind(s_churn, low, high, s_noise)


def _torchsde() -> Any:
    try:
        return importlib.import_module("torchsde")
    except ImportError as error:
        raise ImportError(
            "noise_sampler: the Brownian tree, k-diffusion's default in its SDE samplers, must "
            "find the package torchsde; pip install torchsde, or pass another noise: "
            "gradsampler.noise.SignedRoll(), whose gradient reaches x, or .Philox()"
        ) from error
