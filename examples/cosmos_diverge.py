# SPDX-License-Identifier: Apache-2.0
"""Drive a video away from its baseline, by the gradient of its difference to the initial noise.

    python examples/cosmos_diverge.py --out cosmos_diverge.png

runs Cosmos's sampler on the shipped digits model, whose 8x8 digits are the frames of a video
[B, C, T, H, W]: a baseline without gradient, then ascent of the mean squared difference by Adam on
the anchor. The printed difference grows from near 0; the picture shows both videos and the curve.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import gradsampler as gs
from gradsampler import models
from gradsampler.integrations.cosmos import Sampler

SIGMA_MAX = 80.0
NOISES = {
    "signed_roll": {"noise": gs.noise.SignedRoll(seed=0)},
    "learnable": {"learn_noise": True, "learnable_step_noise": True},
    "off": {"learn_noise": True},
}


def video_denoiser(digits: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The digits model as a denoiser of videos [B, 1, T, 8, 8], whose frame i is digits[i]."""
    network = models.load_network()
    denoiser = gs.EDM(network, network.sigma_data)

    def x0_fn(x: Tensor, sigma: Tensor) -> Tensor:  # x [B, 1, T, 8, 8], sigma [B]
        batch, frames = len(x), x.shape[2]
        label = torch.tensor(digits).repeat(batch)
        images = x.transpose(1, 2).flatten(0, 1)  # [B*T, 1, 8, 8]
        clean = denoiser(images, sigma.repeat_interleave(frames), label=label)
        return clean.unflatten(0, (batch, frames)).transpose(1, 2)

    return x0_fn


def diverge(
    sample: Callable[..., Tensor], sampler: Sampler, x_sigma_max: Tensor, iterations: int, lr: float
) -> tuple[Tensor, Tensor, list[float]]:
    """The baseline, the video at the end, and the difference at each iteration."""
    baseline = sample(x_sigma_max)
    sample(x_sigma_max, allow_grad=True)
    z0 = sampler.z0
    # At the baseline itself the difference is least and its gradient exactly zero: a nudge of one
    # hundredth of the noise gives it a direction.
    with torch.no_grad():
        z0 += 0.01 * torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([z0], lr=lr)
    differences = []
    for i in range(iterations + 1):
        output = sample((SIGMA_MAX * z0).to(x_sigma_max.dtype), allow_grad=True)
        difference = F.mse_loss(output, baseline)
        differences.append(difference.item())
        size = z0.detach().square().mean().sqrt().item()
        print(f"iteration {i}: difference {differences[-1]:.3e}, |z0|/sqrt(d) {size:.3f}")
        if i < iterations:
            optimizer.zero_grad()
            (-difference).backward()
            optimizer.step()
    return baseline, output.detach(), differences


def draw(path: Path, baseline: Tensor, output: Tensor, differences: Sequence[float]) -> None:
    """Writes both videos, a frame beside the other, and the curve of their difference."""
    frames = baseline.shape[2]
    figure = Figure(figsize=(0.9 * frames + 0.4, 4.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 1, 1.5))
    for panel, video, title in (
        (top, baseline, "baseline"),
        (middle, output, f"after {len(differences) - 1} updates of its noise"),
    ):
        panel.suptitle(title, fontsize=9)
        for axis, frame in zip(panel.subplots(1, frames), video[0, 0], strict=True):
            axis.imshow(models.to_pixels(frame).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set_axis_off()
    axis = bottom.subplots()
    axis.semilogy(differences, color="#c2410c")
    axis.set_xlabel("update", fontsize=8)
    axis.set_ylabel("mean squared difference", fontsize=8)
    axis.tick_params(labelsize=7)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=35, help="sampler steps")
    parser.add_argument("--iterations", type=int, default=20, help="updates of the noise")
    parser.add_argument("--lr", type=float, default=0.05, help="Adam's learning rate")
    parser.add_argument("--churn", type=float, default=5.0, help="S_churn; 0 injects nothing")
    parser.add_argument("--noise", choices=NOISES, default="signed_roll")
    parser.add_argument("--out", type=Path, default=Path("cosmos_diverge.png"))
    args = parser.parse_args()
    digits = range(10)
    sampler, x0_fn = Sampler(), video_denoiser(digits)

    def sample(x_sigma_max: Tensor, allow_grad: bool = False) -> Tensor:
        return sampler(
            x0_fn,
            x_sigma_max,
            args.steps,
            sigma_max=SIGMA_MAX,
            S_churn=args.churn,
            allow_grad=allow_grad,
            **NOISES[args.noise],
        )

    noise = torch.randn(1, 1, len(digits), 8, 8, generator=torch.Generator().manual_seed(0))
    results = diverge(sample, sampler, SIGMA_MAX * noise, args.iterations, args.lr)
    draw(args.out, *results)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()
