# SPDX-License-Identifier: Apache-2.0
"""DRaFT-K: LoRA weights trained for a reward by the gradient of the last K steps.

Clark et al. 2024, "Directly fine-tuning diffusion models on differentiable rewards", arXiv
2309.17400, algorithm 1. The reward asks for black and white without grey in between, in digits that
are still read as their labels.

python examples/draft.py --out draft.png
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from contact_sheet import sheet
from torch import Tensor

import gradsampler.integrations.diffusers as gsd
from gradsampler.models import from_pixels, load_classifier

LABEL = torch.arange(10)
_CLASSIFIER = load_classifier()


class Found(NamedTuple):
    """What the training changed."""

    before: Tensor  # [B, 1, 8, 8] in [0, 1]
    after: Tensor  # of the same noise
    scores: list[float]


def reward(images: Tensor, label: Tensor) -> Tensor:
    """[B], of images in [0, 1]."""
    log_p = _CLASSIFIER(from_pixels(images)).log_softmax(1)
    grey = (images * (1 - images)).mean((1, 2, 3))
    return log_p[torch.arange(len(label)), label] - 100 * grey


def train(updates: int = 60, last: int = 2, steps: int = 10, batch: int = 32) -> Found:
    from peft import LoraConfig, inject_adapter_in_model

    pipe = gsd.digits()
    torch.manual_seed(0)
    noise = torch.randn(len(LABEL), 1, 8, 8)
    before = pipe(LABEL, steps, latents=noise).images
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["expand", "contract", "inlet", "outlet"])
    inject_adapter_in_model(config, pipe.denoiser.network)
    learned = [p for p in pipe.denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    run = gsd.pipeline(pipe, memory=f"truncated:{last}")
    scores = []
    for _ in range(updates):
        label = torch.randint(10, (batch,))
        images = run(label, steps, latents=torch.randn(batch, 1, 8, 8), output_type="pt")
        score = reward(images, label).mean()
        optimizer.zero_grad()
        (-score).backward()
        optimizer.step()
        scores.append(score.item())
    after = pipe(LABEL, steps, latents=noise).images
    return Found(before, after, scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("draft.png"))
    parser.add_argument("--updates", type=int, default=60)
    arguments = parser.parse_args()
    found = train(arguments.updates)
    print(f"reward: {found.scores[0]:.3f} -> {found.scores[-1]:.3f}")
    rows = [
        ("DRaFT-2: samples of the network", found.before),
        ("of the same noise with LoRA weights trained against grey", found.after),
    ]
    sheet(arguments.out, rows)


if __name__ == "__main__":
    main()
