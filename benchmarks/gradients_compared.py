# SPDX-License-Identifier: Apache-2.0
"""Are the gradients of samplers right? Ours beside those of k-diffusion and diffusers.

    pip install "gradsampler[test]" && pip install --no-deps k-diffusion
    PYTHONPATH=benchmarks:tests python benchmarks/gradients_compared.py

Each sampler runs in float64 over levels that end in 0, with the same noise each time. Autograd's
gradients of a loss to the start x, to a parameter of the denoiser and to a factor of all levels are
compared with differences of that sampler's own loss. k-diffusion's functions are called without
their no_grad, under which none has a gradient. With --page and --picture it writes the table into
a Markdown file and draws it.
"""

import argparse
import importlib.metadata
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
import gradsampler.integrations.k_diffusion as K
from support import k_diffusion_table

BEGIN, END = "<!-- compared: begin -->", "<!-- compared: end -->"
LEVELS = torch.tensor([14.6, 6.0, 2.5, 1.0, 0.4, 0.1, 0.0], dtype=torch.float64)
TARGETS = ("x", "parameter", "levels")
PEERS = ("k-diffusion", "diffusers", "gradsampler")
RIGHT = 0.05  # some schedulers of diffusers compute in float32 inside, which differences show

_numbers = torch.Generator().manual_seed(0)
X, WEIGHTS, *NOISES = (
    torch.randn(2, 3, 4, 4, generator=_numbers, dtype=torch.float64) for _ in range(40)
)

Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, parameter, factor of the levels -> sample


def denoise(x: Tensor, sigma: Tensor, gain: Tensor) -> Tensor:
    """A smooth denoiser with a parameter; sigma [B] or 0-d."""
    square = sigma.view(-1, *[1] * (x.ndim - 1)) ** 2
    return (x + square * gain * torch.tanh(x)) / (1 + square)


# The samplers. Those of k-diffusion and ours are called in the same words.


def by_k_diffusion(function: Callable, options: dict, x: Tensor, gain: Tensor, factor: Tensor):
    """A run of a function of k-diffusion's form."""
    supply = iter(NOISES)
    plain = ("sample_euler", "sample_heun", "sample_dpm_2", "sample_lms", "sample_dpmpp_2m")
    if function.__name__ not in plain:
        options = {**options, "noise_sampler": lambda sigma, sigma_next: next(supply)}
    model, sigmas = (lambda x, sigma: denoise(x, sigma, gain)), factor * LEVELS
    levels = (sigmas[-2], sigmas[0], 9) if "fast" in function.__name__ else (sigmas,)
    return function(model, LEVELS[0] * x, *levels, disable=True, **options)


def by_solver(solver: str, x: Tensor, gain: Tensor, factor: Tensor) -> Tensor:
    """A run of a solver of ours that k-diffusion has not."""
    model, sigmas = (lambda x, sigma: denoise(x, sigma, gain)), factor * LEVELS
    noise = gs.noise.Philox(seed=3) if solver.startswith("sa") else None
    return gs.sample(model, X, sigmas, start=LEVELS[0] * x, solver=solver, noise=noise)


def by_diffusers(
    kind: str, options: dict, vp: bool, x: Tensor, gain: Tensor, factor: Tensor
) -> Tensor:
    """A plain loop over a scheduler's steps, with its levels times a factor."""
    import diffusers

    scheduler = getattr(diffusers, kind)(**options)
    scheduler.set_timesteps(6)
    base = scheduler.sigmas.double()
    scheduler.sigmas = factor * base
    middles = getattr(scheduler, "sigmas_interpol", None)
    if middles is not None:
        scheduler.sigmas_interpol = factor * middles.double()
    back = "Ancestral" in kind

    def scale(s):
        return (1 + s**2) ** 0.5 if vp else 1.0

    x = base[0] * x / scale(base[0])
    with drawn(scheduler):
        for i, t in enumerate(scheduler.timesteps):
            s = scheduler.sigmas[i]
            if middles is not None and not scheduler.state_in_first_order:
                s = scheduler.sigmas_interpol[i - back]
            if not vp:
                scheduler.scale_model_input(x.detach(), t)  # they insist
            wide = x * scale(s)
            x = scheduler.step((wide - denoise(wide, s, gain)) / s, t, x).prev_sample.double()
    return x


@contextmanager
def drawn(scheduler) -> Iterator[None]:
    """Has a scheduler of diffusers draw the noises of this file."""
    module, supply = sys.modules[type(scheduler).__module__], iter(NOISES)
    kept = getattr(module, "randn_tensor", None)
    module.randn_tensor = lambda *_, **__: next(supply)
    try:
        yield
    finally:
        module.randn_tensor = kept


PLUS = {"algorithm_type": "dpmsolver++"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SA = {"tau_func": lambda t: torch.tensor(1.0)}
IN_DIFFUSERS = {
    "euler": ("EulerDiscreteScheduler", {}, False),
    "heun": ("HeunDiscreteScheduler", {}, False),
    "dpm_2": ("KDPM2DiscreteScheduler", {}, False),
    "lms": ("LMSDiscreteScheduler", {}, False),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", PLUS, True),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, False),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}, False),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE, True),
    "uni_pc": ("UniPCMultistepScheduler", {}, True),
    "deis": ("DEISMultistepScheduler", {}, True),
    "sa_solver": ("SASolverScheduler", SA, True),
}
IN_K_DIFFUSION = (
    "euler",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "dpm_fast",
)
METHODS = tuple(dict.fromkeys((*IN_K_DIFFUSION, *IN_DIFFUSERS)))


def runs(method: str) -> dict[str, Run]:
    """The runs of one method, by peer."""
    found: dict[str, Run] = {}
    name = f"sample_{method}"
    if method in IN_K_DIFFUSION:
        if k_diffusion_table.installed():
            theirs = getattr(k_diffusion_table.sampling(), name).__wrapped__
            found["k-diffusion"] = partial(by_k_diffusion, theirs, {})
        found["gradsampler"] = partial(by_k_diffusion, getattr(K, name), {})
    else:
        found["gradsampler"] = partial(by_solver, method)
    if method in IN_DIFFUSERS:
        found["diffusers"] = partial(by_diffusers, *IN_DIFFUSERS[method])
    return found


# The verdicts.


class Verdict(NamedTuple):
    """What became of one gradient: "right", "wrong", "NaN", "detached" or "error"."""

    kind: str
    error: float = math.nan  # relative to the difference

    def __str__(self) -> str:
        """As the page has it."""
        if self.kind == "wrong":
            return f"**wrong by {100 * self.error:.0f} %**"
        return f"{self.error:.0e}" if self.kind == "right" else f"**{self.kind}**"


def difference(run: Run, target: int) -> float:
    """A central difference of fourth order of the loss along a target."""

    def loss(h: float) -> float:
        at = [X, torch.tensor(0.9, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]
        at[target] = at[target] + (h * WEIGHTS / 10 if target == 0 else h)
        with torch.no_grad():
            return float((run(*at) * WEIGHTS).sum())

    return (8 * (loss(1e-3) - loss(-1e-3)) - (loss(2e-3) - loss(-2e-3))) / 12e-3


def judged(run: Run) -> list[Verdict]:
    """The verdicts on the gradients to the three targets."""
    return [_judged(run, target) for target in range(len(TARGETS))]


def _judged(run: Run, target: int) -> Verdict:
    values = X.clone(), torch.tensor(0.9, dtype=torch.float64), torch.tensor(1.0).double()
    wanted = values[target].requires_grad_()
    try:
        loss = (run(*values) * WEIGHTS).sum()
    except RuntimeError:  # as where a step asks a tensor with a graph for an array
        return Verdict("error")
    if not loss.requires_grad:
        return Verdict("detached")
    (gradient,) = torch.autograd.grad(loss, wanted, allow_unused=True)
    if gradient is None:
        return Verdict("detached")
    slope = float((gradient * (WEIGHTS / 10 if target == 0 else 1)).sum())
    if math.isnan(slope):
        return Verdict("NaN")
    expected = difference(run, target)
    error = abs(slope - expected) / abs(expected)
    return Verdict("right" if error < RIGHT else "wrong", error)


def compared() -> dict[str, dict[str, list[Verdict]]]:
    """The verdicts by method and peer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            method: {peer: judged(run) for peer, run in runs(method).items()} for method in METHODS
        }


def recomputed() -> dict[str, float]:
    """Relative errors of the gradient to x where a step that draws noise is computed twice.

    The step draws from a generator: torch.utils.checkpoint does not set it back.
    """

    def gradient(sample: Callable[[Tensor, torch.Generator], Tensor]) -> Tensor:
        x, generator = X.clone().requires_grad_(), torch.Generator().manual_seed(1)
        return torch.autograd.grad((sample(x, generator) * WEIGHTS).sum(), x)[0]

    def drawing(generator: torch.Generator) -> Callable:
        return lambda *_: torch.randn(X.shape, generator=generator, dtype=X.dtype)

    gain, churn = torch.tensor(0.9, dtype=torch.float64), gs.Churn(s_churn=2.0)
    rise = 1 + churn.eta(1.0, len(LEVELS) - 1)

    def step(x: Tensor, s: Tensor, t: Tensor, draw: Callable) -> Tensor:
        x = x + s * (rise**2 - 1) ** 0.5 * draw()
        return x + (t - rise * s) * (x - denoise(x, rise * s, gain)) / (rise * s)

    def looped(around: Callable) -> Callable:
        def sample(x: Tensor, generator: torch.Generator) -> Tensor:
            draw, x = drawing(generator), LEVELS[0] * x
            for s, t in pairwise(LEVELS):
                x = around(x, s, t, draw)
            return x

        return sample

    def ours(x: Tensor, generator: torch.Generator) -> Tensor:
        noise = gs.noise.Replayed(drawing(generator), generators=[generator])
        return gs.sample(
            lambda x, sigma: denoise(x, sigma, gain),
            X,
            LEVELS,
            start=LEVELS[0] * x,
            churn=churn,
            noise=noise,
            memory="revolve:2",
        )

    exact = gradient(looped(step))
    again = gradient(
        looped(lambda *a: checkpoint(step, *a, use_reentrant=False, determinism_check="none"))
    )
    return {
        name: float((found - exact).norm() / exact.norm())
        for name, found in (
            ("torch.utils.checkpoint around each step", again),
            ('gradsampler, noise.Replayed, memory="revolve:2"', gradient(ours)),
        )
    }


# What is written.


def table(found: dict[str, dict[str, list[Verdict]]]) -> str:
    """The verdicts in Markdown."""
    head = ["method", *(f"{peer}: {target}" for peer in PEERS for target in TARGETS)]
    lines = [head, ["---"] * len(head)]
    for method, by_peer in found.items():
        cells = [f"`{method}`"]
        for peer in PEERS:
            cells += map(str, by_peer.get(peer, [""] * len(TARGETS)))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def versions() -> str:
    """Of what was compared."""
    names = {"k-diffusion": "k_diffusion", "diffusers": "diffusers", "torch": "torch"}
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def draw(found: dict[str, dict[str, list[Verdict]]], path: Path) -> None:
    """The verdicts as a picture."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = {
        "right": "#cfe8d5",
        "wrong": "#e4572e",
        "NaN": "#b3261e",
        "detached": "#f2b84b",
        "error": "#7a5195",
        "": "#f4f4f4",
    }
    figure, axes = plt.subplots(figsize=(9.5, 5.6))
    for row, by_peer in enumerate(found.values()):
        for k, peer in enumerate(PEERS):
            for j in range(len(TARGETS)):
                verdict = by_peer[peer][j] if peer in by_peer else None
                kind = verdict.kind if verdict else ""
                left = k * (len(TARGETS) + 0.4) + j
                axes.add_patch(plt.Rectangle((left, row), 0.96, 0.92, color=colours[kind]))
                text = str(verdict).strip("*") if verdict else "-"
                text = text.replace("wrong by ", "off ")
                dark = kind in ("wrong", "NaN", "error")
                axes.text(
                    left + 0.48,
                    row + 0.46,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if dark else "black",
                )
    for k, peer in enumerate(PEERS):
        left = k * (len(TARGETS) + 0.4)
        axes.text(left + 1.5, -1.15, peer, ha="center", fontsize=11, weight="bold")
        for j, target in enumerate(TARGETS):
            axes.text(left + j + 0.48, -0.35, target, ha="center", fontsize=8)
    axes.set_xlim(-0.1, 3 * len(TARGETS) + 0.9)
    axes.set_ylim(len(found), -1.6)
    axes.set_yticks([row + 0.46 for row in range(len(found))], list(found), fontsize=8.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(
        "Gradients to the start, a parameter and the levels, which end in 0:\n"
        "relative difference from central differences of the same sampler",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--page", type=Path, help="a Markdown file with two marks for the table")
    parser.add_argument("--picture", type=Path, help="a PNG to draw")
    arguments = parser.parse_args()
    found, again = compared(), recomputed()
    lines = [f"{name}: off by {error:.1e}" for name, error in again.items()]
    text = "\n".join(
        [table(found), "", f"Measured with {versions()}.", "", *(f"- {x}" for x in lines)]
    )
    print(text)
    if arguments.page:
        page = arguments.page.read_text()
        before, rest = page.split(BEGIN)
        arguments.page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    if arguments.picture:
        draw(found, arguments.picture)


if __name__ == "__main__":
    main()
