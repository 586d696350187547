# SPDX-License-Identifier: Apache-2.0
"""Fit the noise levels of a short run, so that it lands where a long one does.

    python examples/learn_schedule.py --out learned-schedule.png

A run of 8 steps on the shipped 8x8 digits is compared with one of 100 from the same noise. The
gradient of their squared distance to the 8 levels goes back through all of the run; Adam moves the
levels, which start as Karras's. Errors are on noise that the fit has not seen. A minute or two on
two cores; the result is a function of the arguments.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models


@dataclass(frozen=True)
class Job:
    """What is fitted; both runs end in level 0."""

    steps: int = 8
    reference: int = 100  # steps of the run to land with
    solver: str = "dpmpp_2m"
    updates: int = 150
    lr: float = 0.05
    batch: int = 256
    unseen: int = 512  # noises that errors are measured on


class Levels(torch.nn.Module):
    """Decreasing positive levels and a last one of 0: the logarithms go down by learned gaps."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        logs = start[:-1].log()
        gaps = -logs.diff()
        self.last = torch.nn.Parameter(logs[-1].clone())
        self.gaps = torch.nn.Parameter(gaps.expm1().log())  # softplus gives the gap

    def forward(self) -> Tensor:
        """[N+1] float64."""
        above = F.softplus(self.gaps).flip(0).cumsum(0).flip(0)
        logs = self.last + torch.cat([above, above.new_zeros(1)])
        return torch.cat([logs.exp(), logs.new_zeros(1)])


@dataclass(frozen=True)
class Fit:
    """Levels before and after, and their root mean square errors on unseen noise."""

    before: Tensor
    after: Tensor
    error_before: float
    error_after: float
    losses: list[float]


class Digits:
    """Samples of the shipped network, as a function of a seed and of the levels."""

    def __init__(self, solver: str) -> None:
        network = models.load_network().requires_grad_(False)
        self._denoiser, self._solver = gs.EDM(network, network.sigma_data), solver

    def start(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Noise [B, 1, 8, 8] and labels [B]."""
        generator = torch.Generator().manual_seed(seed)
        z0 = torch.randn(count, 1, 8, 8, generator=generator)
        return z0, torch.randint(models.digits.CLASSES, (count,), generator=generator)

    def land(self, start: tuple[Tensor, Tensor], levels: Tensor) -> Tensor:
        """The samples [B, 1, 8, 8] of a run."""
        z0, label = start
        cond = {"label": label}
        return gs.sample(self._denoiser, z0, levels, solver=self._solver, cond=cond)


def fit(job: Job) -> Fit:
    """Moves the levels until the short run lands with the long one."""
    digits, karras = Digits(job.solver), gs.schedules.karras(job.steps, final="zero")
    long = gs.schedules.karras(job.reference, final="zero")
    seen, unseen = digits.start(job.batch, seed=0), digits.start(job.unseen, seed=1)
    with torch.no_grad():
        target, expected = digits.land(seen, long), digits.land(unseen, long)

    @torch.no_grad()
    def error(levels: Tensor) -> float:
        return (digits.land(unseen, levels) - expected).square().mean().sqrt().item()

    levels = Levels(karras)
    optimizer = torch.optim.Adam(levels.parameters(), lr=job.lr)
    losses = []
    for _ in range(job.updates):
        loss = (digits.land(seen, levels()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = levels().detach()
    return Fit(karras, after, error(karras), error(after), losses)


def draw(path: Path, job: Job, found: Fit, columns: int = 10) -> None:
    """Writes the picture: both schedules, the long run's samples, how far the others are off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    digits = Digits(job.solver)
    start = digits.start(columns, seed=2)
    long = gs.schedules.karras(job.reference, final="zero")
    rows = {
        f"{job.reference} steps": long,
        f"{job.steps}, Karras\noff by {found.error_before:.3f}": found.before,
        f"{job.steps}, fitted\noff by {found.error_after:.3f}": found.after,
    }
    figure = plt.figure(figsize=(9.0, 3.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2])
    axes = left.subplots()
    for levels, label, colour in (
        (found.before, "Karras", "0.6"),
        (found.after, "fitted", "#1b5e8c"),
    ):
        axes.semilogy(levels[:-1], "o-", label=label, color=colour, markersize=4, lw=1.4)
    axes.set(xlabel="step", ylabel="noise level")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    grid = right.subplots(len(rows), columns)
    with torch.no_grad():
        samples = {label: digits.land(start, levels)[:, 0] for label, levels in rows.items()}
    first, *_ = samples.values()
    for line, (label, x) in zip(grid, samples.items(), strict=True):
        shown = {"cmap": "gray_r", "vmin": -1, "vmax": 1}
        if x is not first:
            x, shown = x - first, {"cmap": "RdBu", "vmin": -0.5, "vmax": 0.5}
        for axis, image in zip(line, x, strict=True):
            axis.imshow(image.numpy(), **shown)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in vars(Job()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=Path("learned-schedule.png"))
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    job = Job(**arguments)
    found = fit(job)
    print("levels before", *(f"{x:.4g}" for x in found.before.tolist()))
    print("levels after ", *(f"{x:.4g}" for x in found.after.tolist()))
    print(f"error before {found.error_before:.4f}, after {found.error_after:.4f}")
    draw(out, job, found)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
