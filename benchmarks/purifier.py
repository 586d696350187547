# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a purified classifier under attack, by what gradient the attack takes.

The defence is DiffPure (Nie et al. 2022, arXiv 2205.07460): noise is added to an image, a diffusion
model takes it away again, and a classifier reads the result. The attack is projected gradient
descent within a box around the image. What papers took for the gradient differs:

- classifier alone: the purifier is left out of the attack;
- identity: forward through the purifier, backward as if it were not there (BPDA);
- fewer steps: the gradient of a purifier of 2 steps in place of 10;
- exact: the gradient of the run, of one draw of the noise or of the mean of several (EOT).

make bench-guides
"""

import argparse
from collections.abc import Callable

import rows
import torch
from held_out import held_out
from torch import Tensor
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models

Gradient = Callable[[Tensor, Tensor, int], Tensor]
SIGMA, STEPS = 0.4, 10
NETWORK, CLASSIFIER = models.load_network(), models.load_classifier()
DENOISER = gs.EDM(NETWORK, NETWORK.sigma_data)


def purify(x: Tensor, seed: int, steps: int = STEPS) -> Tensor:
    """Images [B, 1, 8, 8] noised to SIGMA and denoised by the reverse SDE."""
    generator = torch.Generator().manual_seed(seed)
    added, z0 = (torch.randn(x.shape, generator=generator) for _ in range(2))
    levels = gs.schedules.karras(steps, 0.02, SIGMA, final="zero")
    options = {"solver": "euler_ancestral", "noise": gs.noise.Philox(seed)}
    return gs.sample(DENOISER, z0, levels, start=x + SIGMA * added, **options)


def exact(draws: int = 1, steps: int = STEPS) -> Gradient:
    """Through the whole purifier, of the mean loss over several draws of its noise."""

    def gradient(x: Tensor, labels: Tensor, k: int) -> Tensor:
        x = x.clone().requires_grad_()
        losses = [
            F.cross_entropy(CLASSIFIER(purify(x, draws * k + j, steps)), labels)
            for j in range(draws)
        ]
        return torch.autograd.grad(torch.stack(losses).mean(), x)[0]

    return gradient


def identity(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """At the purified image, as if it were the image."""
    with torch.no_grad():
        purified = purify(x, k)
    return alone(purified, labels, k)


def alone(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """Of the classifier without its purifier."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(CLASSIFIER(x), labels), x)[0]


ATTACKS: dict[str, Gradient] = {
    "classifier alone": alone,
    "identity": identity,
    "fewer steps": exact(steps=2),
    "exact": exact(),
    "exact, mean of 4": exact(4),
}


def attack(gradient: Gradient, x: Tensor, labels: Tensor, size: float, updates: int) -> Tensor:
    """Madry et al. 2018, arXiv 1706.06083: ascends the loss by signs, within the box."""
    moved = x
    for k in range(updates):
        step = size / 6 * gradient(moved, labels, k).sign()
        moved = (moved + step).clamp(x - size, x + size).clamp(-1, 1)
    return moved


@torch.no_grad()
def accuracies(x: Tensor, labels: Tensor, draws: int) -> tuple[float, float, float]:
    """Of the purified classifier: median, least and greatest over draws that no attack saw."""
    read = [CLASSIFIER(purify(x, 10_000 + k)).argmax(1) for k in range(draws)]
    shares = torch.stack([(each == labels).double().mean() for each in read])
    return shares.quantile(0.5).item(), shares.min().item(), shares.max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--cores", default="quiet cores", help="what the row says of them")
    arguments = parser.parse_args()
    small = arguments.rehearse
    count, updates, draws = (8, 2, 2) if small else (120, 30, 8)
    x, labels = held_out(count)
    table = []

    def note(name: str, size: float, metric: str, values: tuple[float, float, float]) -> None:
        shape = f"{count}x1x8x8 box {size}, {arguments.cores}"
        table.append(rows.row("purifier", name, shape, "float32", metric, "1", values))
        print(f"purifier {name:20} box {size} {metric} {values[0]:.3f}", flush=True)

    for size in (0.3,) if small else (0.0, 0.2, 0.3, 0.4, 0.5):
        for name, gradient in ATTACKS.items() if size else [("none", alone)]:
            moved = attack(gradient, x, labels, size, updates)
            note(name, size, "accuracy", accuracies(moved, labels, draws))
            if name in ("none", "classifier alone"):
                with torch.no_grad():
                    bare = (CLASSIFIER(moved).argmax(1) == labels).double().mean().item()
                note(name, size, "accuracy without purifier", (bare,) * 3)
    if not small:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
