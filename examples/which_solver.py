# SPDX-License-Identifier: Apache-2.0
"""Errors of samples and of gradients by the number of model calls, for some solvers, on the digits.

python examples/which_solver.py --out docs/pictures
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import gradsampler as gs
from gradsampler import models

CALLS = {"euler": 1, "heun": 2, "res_2ab": 1, "dpmpp_2m": 1, "uni_pc": 1, "lms": 1}
COLOURS = ("#94a3b8", "#475569", "#c2410c", "#1b5e8c", "#2a9d5c", "#7c3aed")
COUNTS = (8, 12, 16, 24, 32, 48, 64)


def both(solver: str, steps: int) -> tuple[Tensor, Tensor]:
    """Samples from eight noises, and the gradients of log p(7) to these; float64."""
    network, classifier = models.load_network().double(), models.load_classifier().double()
    denoiser = gs.EDM(network, network.sigma_data)
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    x = gs.sample(denoiser, z0, gs.schedules.karras(steps, 0.02), solver=solver)
    return x.detach(), torch.autograd.grad(classifier(x).log_softmax(1)[:, 7].sum(), z0)[0]


def errors(found: Tensor, truth: Tensor) -> float:
    """The median over samples of the relative error."""
    off = (found - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    return off.median().item()


def draw(path: Path) -> None:
    """Writes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    truth = both("lms", 400)
    figure = Figure(figsize=(7.2, 3.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True)
    for (solver, calls), colour in zip(CALLS.items(), COLOURS, strict=True):
        runs = {count: both(solver, count // calls) for count in COUNTS}
        for axis, k in zip(axes, (0, 1), strict=True):
            line = [errors(run[k], truth[k]) for run in runs.values()]
            axis.loglog(COUNTS, line, marker="o", ms=3, lw=1.2, color=colour, label=solver)
    for axis, name in zip(axes, ("sample", "gradient to z0"), strict=True):
        axis.set_title(f"{name}: relative error", fontsize=9, loc="left")
        axis.set_xlabel("model calls of the run", fontsize=8)
        axis.set_xticks([8, 16, 32, 64], ["8", "16", "32", "64"])
        axis.minorticks_off()
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "which-solver.png", facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of the picture")
    arguments = parser.parse_args()
    draw(arguments.out)
    print(f"wrote {arguments.out / 'which-solver.png'}")


if __name__ == "__main__":
    main()
