# SPDX-License-Identifier: Apache-2.0
"""Noise levels, flow times, betas and respaced timesteps, in float64 on the host.

Continuous schedules come in two forms. ``final="sigma_min"`` gives ``steps + 1`` levels that end at
sigma_min; ``final="zero"`` gives ``steps`` levels that end at sigma_min and then 0. In both forms
the first level and the last positive one are exactly the given bounds.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, islice, repeat

import torch
from torch import Tensor

from gradsampler import _checks

__all__ = [
    "alphas_cumprod",
    "betas",
    "discrete",
    "exponential",
    "flow",
    "karras",
    "polyexponential",
    "respace",
    "restart",
    "vp",
]

_FINALS = ("sigma_min", "zero")
_BETAS = ("linear", "scaled_linear", "cosine")


def karras(
    steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    final: str = "sigma_min",
) -> Tensor:
    """Levels evenly spaced in sigma^(1/rho): Karras et al. 2022, arXiv 2206.00364, eq. 5.

    Args:
        steps: number of solver steps, at least 1.
        sigma_min: lowest positive level, in units of the data, above 0.
        sigma_max: first level, above sigma_min.
        rho: above 0; 1 is linear in sigma, larger crowds the levels towards sigma_min.
        final: "sigma_min" ends there, as Cosmos does; "zero" appends a 0, as k-diffusion does.

    Returns:
        [steps + 1] float64, strictly decreasing.

    Raises:
        TypeError, ValueError: an argument is not as above, or levels coincide in float64.

    Example:
        >>> import gradsampler as gs
        >>> gs.schedules.karras(2, sigma_min=1, sigma_max=9, rho=2).tolist()
        [9.0, 4.0, 1.0]
    """
    count = _positive_levels("karras", steps, final)
    ends = _ends("karras", sigma_min, sigma_max)
    rho = _positive("karras: rho", rho)
    ramp = _even(0.0, 1.0, count)
    high, low = ramp.new_tensor(ends) ** (1 / rho)
    return _levels("karras", _pinned((high + ramp * (low - high)) ** rho, ends), final)


def exponential(steps: int, sigma_min: float, sigma_max: float, final: str = "sigma_min") -> Tensor:
    """Levels evenly spaced in log sigma, as k-diffusion's ``get_sigmas_exponential``.

    That is even in half-log-SNR, as DPM-Solver wants: Lu et al. 2022, arXiv 2206.00927.

    Args:
        steps, sigma_min, sigma_max, final: as for ``karras``.

    Returns:
        [steps + 1] float64, strictly decreasing.

    Raises:
        TypeError, ValueError: an argument is not as above, or levels coincide in float64.

    Example:
        >>> import gradsampler as gs
        >>> [round(s, 9) for s in gs.schedules.exponential(2, 0.01, 100).tolist()]
        [100.0, 1.0, 0.01]
    """
    return _log_levels("exponential", steps, sigma_min, sigma_max, 1.0, final)


def polyexponential(
    steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0, final: str = "sigma_min"
) -> Tensor:
    """Levels polynomial in log sigma, as k-diffusion's ``get_sigmas_polyexponential``.

    ``log sigma_i = log sigma_min + (1 - i/N)^rho log(sigma_max/sigma_min)``

    Args:
        steps, sigma_min, sigma_max, final: as for ``karras``.
        rho: above 0; 1 is ``exponential``, larger crowds the levels towards sigma_min.

    Returns:
        [steps + 1] float64, strictly decreasing.

    Raises:
        TypeError, ValueError: an argument is not as above, or levels coincide in float64.

    Example:
        >>> import gradsampler as gs
        >>> [round(s, 9) for s in gs.schedules.polyexponential(2, 1, 10**4, rho=2).tolist()]
        [10000.0, 10.0, 1.0]
    """
    rho = _positive("polyexponential: rho", rho)
    return _log_levels("polyexponential", steps, sigma_min, sigma_max, rho, final)


def vp(
    steps: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    final: str = "sigma_min",
) -> Tensor:
    """Levels of the continuous variance-preserving process at even times from 1 to eps_s.

    ``sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)``: Karras et al. 2022, arXiv 2206.00364,
    table 1, from Song et al. 2021, arXiv 2011.13456, eq. 32; as k-diffusion's ``get_sigmas_vp``.

    Args:
        steps: number of solver steps, at least 1.
        beta_d: growth of the noise rate over the unit of time, at least 0.
        beta_min: noise rate at time 0, at least 0.
        eps_s: last time, strictly between 0 and 1.
        final: "sigma_min" ends at the level of eps_s; "zero" appends a 0.

    Returns:
        [steps + 1] float64, strictly decreasing.

    Raises:
        TypeError, ValueError: an argument is not as above, or levels coincide in float64.

    Example:
        >>> import gradsampler as gs
        >>> [round(s, 4) for s in gs.schedules.vp(2).tolist()]
        [152.167, 3.4222, 0.0105]
    """
    count = _positive_levels("vp", steps, final)
    beta_d = _checks.finite("vp: beta_d", beta_d, 0.0)
    beta_min = _checks.finite("vp: beta_min", beta_min, 0.0)
    eps_s = _positive("vp: eps_s", eps_s)
    if eps_s >= 1:
        _checks.fail("vp: eps_s", "be below 1", eps_s)
    t = _even(1.0, eps_s, count)
    return _levels("vp", torch.expm1(t * (beta_d * t / 2 + beta_min)).sqrt(), final)


def restart(
    levels: Tensor,
    t_min: float,
    t_max: float,
    steps: int,
    times: int = 1,
    rho: float = 7.0,
) -> Tensor:
    """Levels that go back up, for ``solver="restart"`` (Xu et al. 2023, arXiv 2306.14878).

    From the level nearest to t_min they return to that nearest to t_max, and come down again in
    ``steps`` steps, evenly spaced in sigma^(1/rho); that ``times`` times. Several such intervals
    are put in one after the other. They are k-diffusion's of AUTOMATIC1111's restart sampler.

    Args:
        levels: [N+1] falling levels, as from ``karras``.
        t_min, t_max: where to go up, and how far.
        steps: of one way down, at least 1.
        times: how often, at least 1.
        rho: above 0.

    Returns:
        [N+1 + times * (steps + 1)] float64.

    Raises:
        TypeError, ValueError: an argument is not as above, or no level lies between the two.

    Example:
        >>> import torch, gradsampler as gs
        >>> levels = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)
        >>> gs.schedules.restart(levels, 1.0, 9.0, steps=2, rho=2).tolist()
        [9.0, 4.0, 1.0, 9.0, 4.0, 1.0, 0.0]
    """
    levels = _checks.floating("restart: levels", levels).to("cpu", torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        _checks.fail("restart: levels", "have shape [N+1] with N >= 1 steps", list(levels.shape))
    ends = [_positive("restart: t_min", t_min), _positive("restart: t_max", t_max)]
    steps = _checks.integer("restart: steps", steps, 1)
    times = _checks.integer("restart: times", times, 1)
    low, high = (int((levels.detach() - end).abs().argmin()) for end in ends)
    if high >= low or not levels[low] > 0:
        found = f"{levels[low].item():.6g} and {levels[high].item():.6g}"
        _checks.fail("restart: t_max", "be nearest to a level above t_min's, both positive", found)
    power = 1 / _positive("restart: rho", rho)
    top, bottom = levels[high] ** power, levels[low] ** power
    down = (top + _even(0.0, 1.0, steps + 1) * (bottom - top)) ** rho
    down = torch.cat([levels[high : high + 1], down[1:-1], levels[low : low + 1]])
    return torch.cat([levels[: low + 1], *[down] * times, levels[low + 1 :]])


def flow(steps: int, shift: float = 1.0) -> Tensor:
    """Flow times from 1 (noise) to 0 (data), shifted towards the noise as in Stable Diffusion 3.

    ``t' = m t / (1 + (m - 1) t)`` at ``t = 1 - i/N``: Esser et al. 2024, arXiv 2403.03206, eq. 23.

    Args:
        steps: number N of solver steps, at least 1.
        shift: m, above 0; 1 leaves the times even, larger spends more steps near the noise.

    Returns:
        [steps + 1] float64, strictly decreasing, from exactly 1 to exactly 0.

    Raises:
        TypeError, ValueError: an argument is not as above, or times coincide in float64.

    Example:
        >>> import gradsampler as gs
        >>> gs.schedules.flow(2, shift=3).tolist()
        [1.0, 0.75, 0.0]
    """
    steps = _checks.integer("flow: steps", steps, 1)
    shift = _positive("flow: shift", shift)
    t = _even(1.0, 0.0, steps + 1)
    # 1 + (m - 1) t written as (1 - t) + m t, which is exactly m at t = 1.
    return _levels("flow", shift * t / ((1 - t) + shift * t), "sigma_min")


def betas(name: str, steps: int) -> Tensor:
    """Variances that a discrete diffusion process adds at each training step.

    Args:
        name: "linear", 1e-4 to 0.02 at 1000 steps and scaled by 1000/steps as in guided-diffusion
            (Ho et al. 2020, arXiv 2006.11239, section 4); "scaled_linear", linear in the root from
            0.00085 to 0.012 (Stable Diffusion; Rombach et al. 2022, arXiv 2112.10752); "cosine",
            ``alpha_bar(t) = cos^2((t + 0.008)/1.008 pi/2)``, betas at most 0.999
            (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17).
        steps: number of training steps, at least 1; for "linear" at least 21, or betas reach 1.

    Returns:
        [steps] float64, each strictly between 0 and 1.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> import gradsampler as gs
        >>> gs.schedules.betas("linear", 1000)[[0, -1]].tolist()
        [0.0001, 0.02]
    """
    name = _checks.choice("betas: name", name, _BETAS)
    steps = _checks.integer("betas: steps", steps, 1)
    if name == "scaled_linear":
        return _even(0.00085**0.5, 0.012**0.5, steps) ** 2
    if name == "cosine":
        t = _even(0.0, 1.0, steps + 1)
        alpha_bar = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    if steps <= 20:
        expected = "be at least 21 for 'linear', whose last beta is 20/steps"
        _checks.fail("betas: steps", expected, steps)
    scale = 1000 / steps
    return _even(scale * 1e-4, scale * 0.02, steps)


def alphas_cumprod(betas: Tensor) -> Tensor:
    """Signal power left after each training step, ``alpha_bar_t = prod (1 - beta_s), s <= t``.

    Ho et al. 2020, arXiv 2006.11239, eq. 4.

    Args:
        betas: [steps] floating tensor, each strictly between 0 and 1.

    Returns:
        [steps] float64 on the CPU, differentiable in betas.

    Raises:
        TypeError, ValueError: betas is not as above.

    Example:
        >>> import gradsampler as gs, torch
        >>> gs.schedules.alphas_cumprod(torch.tensor([0.5, 0.75])).tolist()
        [0.5, 0.125]
    """
    return torch.cumprod(1 - _fractions("alphas_cumprod: betas", betas), dim=0)


def respace(steps: int, counts: str | Sequence[int]) -> list[int]:
    """Training timesteps to keep, as guided-diffusion's ``space_timesteps`` chooses them.

    Args:
        steps: number of training steps, at least 1.
        counts: "ddimN" keeps N timesteps at an integer stride (Song et al. 2020, arXiv 2010.02502,
            appendix D.2). "10,15,20" or [10, 15, 20] cuts the process into three sections of equal
            size, the first ones longer by one where it does not divide, and keeps that many
            of each, evenly spread from its first timestep to its last.

    Returns:
        The kept timesteps in ascending order, each in 0 .. steps - 1.

    Raises:
        TypeError, ValueError: an argument is not as above, or the counts cannot be kept.

    Example:
        >>> import gradsampler as gs
        >>> gs.schedules.respace(1000, "ddim5")
        [0, 200, 400, 600, 800]
        >>> gs.schedules.respace(20, "2,3")
        [0, 9, 10, 14, 19]
    """
    steps = _checks.integer("respace: steps", steps, 1)
    if isinstance(counts, str) and counts.startswith("ddim"):
        return _ddim(steps, counts)
    sections = _sections(counts)
    size, extra = divmod(steps, len(sections))
    kept: list[int] = []
    start = 0
    for k, count in enumerate(sections):
        stop = start + size + (k < extra)
        if count > stop - start:
            expected = f"be at most {stop - start}, the size of its section"
            _checks.fail(f"respace: counts[{k}]", expected, count)
        stride = (stop - start - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: at ties only the sum rounds as guided-diffusion does.
        kept += [start + round(at) for at in islice(accumulate(repeat(stride), initial=0.0), count)]
        start = stop
    return kept


def discrete(
    alphas_cumprod: Tensor, timesteps: Sequence[int] | None = None, final: str = "zero"
) -> Tensor:
    """Levels of a discrete process, ``sigma = sqrt((1 - alpha_bar)/alpha_bar)``, noisiest first.

    x/sqrt(alpha_bar) is clean data plus noise of this level: Song et al. 2020, arXiv 2010.02502,
    section 4.3.

    Args:
        alphas_cumprod: [T] floating tensor, strictly decreasing, each strictly between 0 and 1.
        timesteps: distinct indices in 0 .. T - 1, in any order; None takes all.
        final: "zero" appends a 0; "sigma_min" ends at the level of the least noisy timestep.

    Returns:
        [len(timesteps) + 1], or one less for "sigma_min"; float64 on the CPU, strictly decreasing,
        differentiable in alphas_cumprod.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> import gradsampler as gs, torch
        >>> gs.schedules.discrete(torch.tensor([0.8, 0.5]).double(), [1]).tolist()
        [1.0, 0.0]
    """
    final = _checks.choice("discrete: final", final, _FINALS)
    alpha_bar = _fractions("discrete: alphas_cumprod", alphas_cumprod)
    kept = range(len(alpha_bar)) if timesteps is None else timesteps
    if not isinstance(kept, Sequence):
        _checks.fail_type("discrete: timesteps", "be a list of ints or None", timesteps)
    if len(kept) == 0:
        _checks.fail("discrete: timesteps", "hold at least one timestep", timesteps)
    for k, t in enumerate(kept):
        if _checks.integer(f"discrete: timesteps[{k}]", t, 0) >= len(alpha_bar):
            expected = f"be below {len(alpha_bar)}, the length of alphas_cumprod"
            _checks.fail(f"discrete: timesteps[{k}]", expected, t)
    alpha_bar = alpha_bar[sorted(kept, reverse=True)]
    hint = "alphas_cumprod must decrease strictly and timesteps be distinct"
    return _levels("discrete", ((1 - alpha_bar) / alpha_bar).sqrt(), final, hint)


def _even(start: float, stop: float, count: int) -> Tensor:
    """[count] evenly spaced numbers from start to stop, both to the bit; [start] if count is 1."""
    done = torch.arange(count, dtype=torch.float64, device="cpu") / max(count - 1, 1)
    return (1 - done) * start + done * stop


def _log_levels(
    owner: str, steps: int, sigma_min: float, sigma_max: float, rho: float, final: str
) -> Tensor:
    count = _positive_levels(owner, steps, final)
    ends = _ends(owner, sigma_min, sigma_max)
    high, low = math.log(ends[0]), math.log(ends[1])
    ramp = _even(1.0, 0.0, count) ** rho
    return _levels(owner, _pinned(torch.exp(low + ramp * (high - low)), ends), final)


def _pinned(sigma: Tensor, ends: tuple[float, float]) -> Tensor:
    """Writes the bounds over the first and, if there are two, the last level."""
    sigma[0] = ends[0]
    if len(sigma) > 1:
        sigma[-1] = ends[1]
    return sigma


def _levels(
    owner: str, sigma: Tensor, final: str, hint: str = "take fewer steps or milder arguments"
) -> Tensor:
    """The finished schedule, checked to decrease strictly."""
    if final == "zero":
        sigma = torch.cat([sigma, sigma.new_zeros(1)])
    falls = sigma.diff(prepend=sigma.new_tensor([math.inf])) < 0
    if not falls.all():
        k = int(falls.logical_not().nonzero()[0])
        got = f"{sigma[max(k - 1, 0) : k + 1].tolist()} at index {k}"
        _checks.fail(f"{owner}: levels", "be finite and decrease strictly in float64", got, hint)
    return sigma


def _positive_levels(owner: str, steps: int, final: str) -> int:
    """How many levels above 0 the schedule has."""
    steps = _checks.integer(f"{owner}: steps", steps, 1)
    return steps + (_checks.choice(f"{owner}: final", final, _FINALS) == "sigma_min")


def _positive(argument: str, x: object) -> float:
    value = _checks.finite(argument, x)
    if value <= 0:
        _checks.fail(argument, "be above 0", x)
    return value


def _ends(owner: str, sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low = _positive(f"{owner}: sigma_min", sigma_min)
    high = _checks.finite(f"{owner}: sigma_max", sigma_max)
    if high <= low:
        _checks.fail(f"{owner}: sigma_max", f"be above sigma_min {low}", sigma_max)
    return high, low


def _fractions(argument: str, x: object) -> Tensor:
    """Returns ``x`` in float64 on the CPU if it is a vector of numbers between 0 and 1."""
    x = _checks.floating(argument, x)
    if x.ndim != 1 or x.numel() == 0:
        _checks.fail(argument, "have shape [steps] with at least one step", list(x.shape))
    x = x.to("cpu", torch.float64)
    inside = (x > 0) & (x < 1)
    if not inside.all():
        k = int(inside.logical_not().nonzero()[0])
        _checks.fail(argument, "lie strictly between 0 and 1", f"{x[k].item()} at index {k}")
    return x


def _ddim(steps: int, counts: str) -> list[int]:
    digits = counts.removeprefix("ddim")
    if not digits.isdecimal() or int(digits) == 0:
        _checks.fail("respace: counts", "be 'ddimN' with N at least 1", repr(counts))
    stride = -(-steps // int(digits))  # the only one that can keep N, if any does
    kept = list(range(0, steps, stride))
    if len(kept) != int(digits) or stride >= steps:
        expected = f"be 'ddimN' where an integer stride below {steps} keeps exactly N timesteps"
        hint = f"stride {stride} keeps {len(kept)}"
        _checks.fail("respace: counts", expected, repr(counts), hint)
    return kept


def _sections(counts: object) -> list[int]:
    if isinstance(counts, str):
        parts = [part.strip() for part in counts.split(",")]
        if not all(part.isdecimal() for part in parts):
            expected = "be 'ddimN' or section counts such as '10,15,20'"
            _checks.fail("respace: counts", expected, repr(counts))
        counts = [int(part) for part in parts]
    if not isinstance(counts, Sequence):
        _checks.fail_type("respace: counts", "be a string or a list of ints", counts)
    sections = [_checks.integer(f"respace: counts[{k}]", n, 0) for k, n in enumerate(counts)]
    if not any(sections):
        _checks.fail("respace: counts", "keep at least one timestep", counts)
    return sections
