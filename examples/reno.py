# SPDX-License-Identifier: Apache-2.0
"""ReNO: the noise of a few-step model, optimised for a sum of rewards.

Eyring et al. 2024, "ReNO: Enhancing one-step text-to-image models through reward-based noise
optimization", arXiv 2406.04312, algorithm 1. Here the model has four steps, since the digits
network is not distilled to one, and the rewards are that a digit is still read as what it is, and
that it has much ink.

python examples/reno.py --out reno.png
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from contact_sheet import sheet
from torch import Tensor

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from gradsampler.models import from_pixels, load_classifier

LABEL = torch.arange(10)
_CLASSIFIER = load_classifier()


class Found(NamedTuple):
    """Images before and after."""

    before: Tensor  # [B, 1, 8, 8] in [0, 1]
    after: Tensor
    scores: list[float]


def legible(images: Tensor) -> Tensor:
    """The log-probability [B] of the label."""
    log_p = _CLASSIFIER(from_pixels(images)).log_softmax(1)
    return log_p[torch.arange(len(LABEL)), LABEL]


def ink(images: Tensor) -> Tensor:
    """The mean grey value [B]."""
    return images.mean((1, 2, 3))


def search(steps: int = 50) -> Found:
    pipe = gsd.digits()
    reward = gs.rewards.Weighted([(legible, 1.0), (ink, 100.0)])
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(LABEL), 1, 8, 8, generator=generator)
    call = {"label": LABEL, "num_inference_steps": 4}
    found = gsd.optimize(
        pipe,
        reward,
        latents=latents,
        steps=steps,
        lr=1.0,
        optimizer=torch.optim.SGD,
        grad_clip=1.0,
        regularizer=gs.regularizers.ChiNorm(0.01),
        progress=False,
        **call,
    )
    before = pipe(**call, latents=latents).images
    return Found(before, found.sample, [step.loss for step in found.history])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reno.png"))
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    found = search(arguments.steps)
    print(f"reward: {found.scores[0]:.3f} -> {found.scores[-1]:.3f}")
    rows = [("ReNO: samples of four steps", found.before), ("with more ink", found.after)]
    sheet(arguments.out, rows)


if __name__ == "__main__":
    main()
