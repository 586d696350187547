# SPDX-License-Identifier: Apache-2.0
"""DOODL: guidance by a classifier through all steps, by the noise that a run starts from.

Wallace et al. 2023, "End-to-end diffusion latent optimization improves classifier guidance",
arXiv 2303.13703, algorithm 1: momentum, and the noise put back to its sphere after each update.
Their sampler is inverted for its gradient to fit into memory; here the calls are made again.

python examples/doodl.py --out doodl.png
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from contact_sheet import sheet
from torch import Tensor

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from gradsampler.models import NULL_CLASS, from_pixels, load_classifier

TARGET = 5
_CLASSIFIER = load_classifier()


class Found(NamedTuple):
    """Images before and after."""

    before: Tensor  # [B, 1, 8, 8] in [0, 1]
    after: Tensor
    noise: Tensor
    scores: list[float]


def read_as_target(images: Tensor) -> Tensor:
    """The log-probability [B] of the target digit."""
    return _CLASSIFIER(from_pixels(images)).log_softmax(1)[:, TARGET]


def search(updates: int = 40, steps: int = 50) -> Found:
    pipe = gsd.digits()
    generator = torch.Generator().manual_seed(1)
    sphere = gs.regularizers.Sphere()
    latents = sphere(torch.randn(10, 1, 8, 8, generator=generator))
    call = {"label": torch.full((10,), NULL_CLASS), "num_inference_steps": steps}
    found = gsd.optimize(
        pipe,
        read_as_target,
        latents=latents,
        steps=updates,
        lr=2.0,
        optimizer=lambda noise, lr: torch.optim.SGD(noise, lr=lr, momentum=0.9),
        grad_clip=0.5,
        projection=sphere,
        memory="revolve:8",
        progress=False,
        **call,
    )
    before = pipe(**call, latents=latents).images
    return Found(before, found.sample, found.z0, [step.loss for step in found.history])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("doodl.png"))
    parser.add_argument("--updates", type=int, default=40)
    arguments = parser.parse_args()
    found = search(arguments.updates)
    print(f"log p({TARGET}): {found.scores[0]:.3f} -> {found.scores[-1]:.3f}")
    rows = [("DOODL: digits of any class", found.before), (f"read as a {TARGET}", found.after)]
    sheet(arguments.out, rows)


if __name__ == "__main__":
    main()
