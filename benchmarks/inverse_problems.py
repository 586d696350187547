# SPDX-License-Identifier: Apache-2.0
"""A digit from a part of it, or from a coarse picture: by its noise z0, and by a start halfway.

make bench-guides
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import rows
import torch
from held_out import held_out
from torch import Tensor
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models

Measure = Callable[[Tensor], Tensor]
NETWORK = models.load_network()
DENOISER = gs.EDM(NETWORK, NETWORK.sigma_data)
SEEN = torch.ones(1, 1, 8, 8)
SEEN[..., 2:6, 2:6] = 0
SIGMA = 1.0

PROBLEMS: dict[str, tuple[Measure, Measure]] = {  # what is measured, and a first guess from it
    "inpainting": (lambda x: x * SEEN, lambda y: y),
    "super-resolution": (
        lambda x: F.avg_pool2d(x, 2),
        lambda y: F.interpolate(y, scale_factor=2),
    ),
}


def by_z0(measure: Measure, y: Tensor, updates: int, seed: int) -> Tensor:
    """The sample whose measurement is y, found by its initial noise."""
    z0 = torch.randn(len(y), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return gs.optimize(
        DENOISER,
        z0.requires_grad_(),
        gs.schedules.karras(12, final="zero"),
        lambda x: (measure(x) - y).square().sum(),
        regularizer=gs.regularizers.ChiNorm(0.1),
        solver="heun",
        steps=updates,
    ).sample


def by_start(measure: Measure, y: Tensor, guess: Tensor, updates: int, seed: int) -> Tensor:
    """The same, found by the state at level SIGMA, which begins as the guess with noise."""
    z0 = torch.randn(guess.shape, generator=torch.Generator().manual_seed(seed))
    levels = gs.schedules.karras(6, 0.02, SIGMA, final="zero")
    start = (guess + SIGMA * z0).requires_grad_()
    optimizer = torch.optim.Adam([start], lr=0.05)
    for _ in range(updates):
        x = gs.sample(DENOISER, z0, levels, solver="heun", start=start)
        optimizer.zero_grad()
        (measure(x) - y).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        return gs.sample(DENOISER, z0, levels, solver="heun", start=start)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square, on the data scale of [-1, 1]."""
    return (a - b).square().mean().sqrt().item()


def draw(pictures: dict[str, dict[str, Tensor]], path: Path) -> None:
    """Rows of images by problem and way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = 5
    figure = Figure(figsize=(7.2, 3.6), dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subfigures(1, 2, wspace=0.02)
    for panel, (problem, images) in zip(panels, pictures.items(), strict=True):
        panel.suptitle(problem, fontsize=9)
        axes = panel.subplots(len(images), count)
        panel.subplots_adjust(0.2, 0.01, 0.99, 0.91, wspace=0.06, hspace=0.06)
        for row, (name, batch) in zip(axes, images.items(), strict=True):
            place = {"transform": row[0].transAxes, "ha": "right", "va": "center"}
            row[0].text(-0.12, 0.5, name, fontsize=8, **place)
            for axis, image in zip(row, batch[:count, 0], strict=True):
                axis.set_axis_off()
                axis.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "inverse-problems.png", facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--cores", default="quiet cores", help="what the row says of them")
    parser.add_argument("--pictures", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    count, updates, seeds = (5, 2, 1) if arguments.rehearse else (24, 100, 3)
    truth, _ = held_out(count)
    table, pictures = [], {}
    for problem, (measure, guess) in PROBLEMS.items():
        y = measure(truth)
        first = guess(y)
        found = {"by z0": [], "by start": []}
        for seed in range(seeds):
            found["by z0"].append(by_z0(measure, y, updates, seed))
            found["by start"].append(by_start(measure, y, first, updates, seed))
        shown = first if problem == "super-resolution" else first.masked_fill(SEEN == 0, 0.2)
        best = {name: runs[0] for name, runs in found.items()}
        pictures[problem] = {"digit": truth, "measured": shown} | best
        for name, runs in {"first guess": [first], **found}.items():
            for metric, errors in (
                ("distance to the digit", [distance(x, truth) for x in runs]),
                ("distance to the measurement", [distance(measure(x), y) for x in runs]),
            ):
                values = (statistics.median(errors), min(errors), max(errors))
                shape = f"{count}x1x8x8 {problem}, {arguments.cores}"
                table.append(rows.row("inverse", name, shape, "float32", metric, "1", values))
                print(f"inverse {problem:18} {name:12} {metric:28} {values[0]:.4f}", flush=True)
    if not arguments.rehearse:
        draw(pictures, arguments.pictures)
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
