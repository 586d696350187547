# SPDX-License-Identifier: Apache-2.0
"""D-Flow: an inverse problem solved by the point that a flow starts from.

Ben-Hamu et al. 2024, "D-Flow: differentiating through flows for controlled generation", arXiv
2402.14017, algorithm 1: L-BFGS over the source of a flow, whose sample is to agree with what is
known, here the upper half of a digit.

python examples/d_flow.py --out d-flow.png
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contact_sheet import sheet
from torch import Tensor

import gradsampler.integrations.diffusers as gsd
from gradsampler.models import NULL_CLASS

COUNT, ROWS = 10, 5  # completions, and rows of pixels that are known


class Found(NamedTuple):
    """Completions of a picture."""

    picture: Tensor  # [1, 1, 8, 8] in [0, 1]
    before: Tensor  # [B, 1, 8, 8]
    after: Tensor
    losses: list[float]


def flow() -> Any:
    from diffusers import FlowMatchHeunDiscreteScheduler

    return gsd.digits(FlowMatchHeunDiscreteScheduler())


def search(iterations: int = 15, steps: int = 6) -> Found:
    pipe = flow()
    picture = pipe(torch.tensor([3]), steps, generator=torch.Generator().manual_seed(3)).images
    run = gsd.pipeline(pipe, memory="checkpoint")
    call = {"label": torch.full((COUNT,), NULL_CLASS), "num_inference_steps": steps}
    source = torch.randn(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    before = pipe(**call, latents=source).images
    source.requires_grad_()
    optimizer = torch.optim.LBFGS([source], max_iter=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        state = run(**call, latents=source, output_type="latent")
        known = (state / 2 + 0.5 - picture)[..., :ROWS, :]
        return known.square().sum((1, 2, 3)).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    losses = [optimizer.step(closure).item() for _ in range(iterations)]
    after = pipe(**call, latents=source.detach()).images
    return Found(picture, before, after, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("d-flow.png"))
    parser.add_argument("--iterations", type=int, default=15)
    arguments = parser.parse_args()
    found = search(arguments.iterations)
    print(f"squared error of what is known: {found.losses[0]:.4f} -> {found.losses[-1]:.4f}")
    known = found.picture.clone()
    known[..., ROWS:, :] = 0.5
    rows = [
        (
            "D-Flow: a picture of which the grey part is not known",
            torch.cat([found.picture, known]),
        ),
        ("samples of the sources before", found.before),
        ("and after", found.after),
    ]
    sheet(arguments.out, rows)


if __name__ == "__main__":
    main()
