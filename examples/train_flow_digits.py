# SPDX-License-Identifier: Apache-2.0
"""Train a small velocity network on 8x8 digits by flow matching, sample it three ways, draw it.

    python examples/train_flow_digits.py --out flow_digits

Times and training pairs are those of Open-Sora, from `gradsampler.integrations.open_sora`. The
samples come from euler and heun in flow time, and from dpmpp_2m, a solver in VE coordinates,
through `gs.Flow`. A support vector machine trained on real digits reads them. Needs scikit-learn;
takes a minute or two. The result is a function of the seed, the step count and the thread count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradsampler as gs
from gradsampler.integrations import open_sora
from gradsampler.models import digits

BATCH, EMA_DECAY, LEARNING_RATE = 256, 0.998, 2e-3
EVALUATIONS = 24  # of the network, for each sample


class Velocity(nn.Module):
    """A residual MLP with adaptive layer norm, called as Open-Sora calls its network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = digits.DigitsNetwork(dropout=0.0)

    def forward(
        self, img: Tensor, timesteps: Tensor, label: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """The velocity [B, 1, 1, 8, 8] of one-frame videos at flow times [B]."""
        # The embedding's frequencies are whole numbers; half a turn tells 0 from 1.
        out: Tensor = self.body(img.flatten(1).view(-1, 1, 8, 8), torch.pi * timesteps, label)
        return out.view_as(img)


def read_data() -> tuple[Tensor, Tensor]:
    """Digits as one-frame videos [N, 1, 1, 8, 8] in [-1, 1], and their labels."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None, None] / 16
    return digits.from_pixels(pixels), torch.tensor(data.target, dtype=torch.int64)


def train(images: Tensor, labels: Tensor, steps: int, seed: int) -> tuple[nn.Module, list[float]]:
    """Minimise the squared error of the velocity; returns the moving average, and the losses."""
    torch.manual_seed(seed)
    network, losses = Velocity(), []
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (BATCH,))
        batch, _, _, target = open_sora.prepare_inputs(
            images[index], {"label": labels[index]}, patch_size=None, clamp=True
        )
        loss = F.mse_loss(network(**batch), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update_parameters(network)
        losses.append(loss.item())
    return average.module.eval().requires_grad_(False), losses


def draw(network: nn.Module, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Samples [B, 1, 1, 8, 8] by solver, all from the same noise and for the same labels."""
    z0 = torch.randn(len(labels), 1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    options: dict[str, Any] = {"cond": {"label": labels}}
    flow = {**options, "prediction": "flow"}
    times, half = gs.schedules.flow(EVALUATIONS), gs.schedules.flow(EVALUATIONS // 2)
    levels = gs.schedules.karras(EVALUATIONS, sigma_min=0.02, sigma_max=80.0, final="zero")
    return {
        "euler": gs.sample(network, z0, times, solver="euler", **flow),
        "heun": gs.sample(network, z0, half, solver="heun", **flow),
        "dpmpp_2m": gs.sample(gs.Flow(network), z0, levels, solver="dpmpp_2m", **options),
    }


def picture(path: Path, samples: dict[str, Tensor], losses: list[float], heading: str) -> None:
    """Writes a PNG: a panel of digits for each solver, and the training loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, faint, accent = "#1b1b1f", "#8a8a94", "#c2410c"
    figure = Figure(figsize=(13.2, 4.4), dpi=150)
    FigureCanvasAgg(figure)
    figure.suptitle(heading, x=0.02, y=0.975, ha="left", fontsize=10, color=ink)
    panels: Any = figure.subfigures(1, len(samples) + 1, width_ratios=[1] * len(samples) + [0.9])
    for panel, (name, x) in zip(panels, samples.items(), strict=False):
        panel.text(0.06, 0.85, name, fontsize=10, color=accent)
        grid = panel.add_axes((0.06, 0.03, 0.9, 0.79))
        tiles = digits.to_pixels(x.view(10, -1, 8, 8))[:, :10]  # [digit, row, 8, 8]
        framed = F.pad(tiles, (1, 1, 1, 1)).permute(1, 2, 0, 3).reshape(-1, 100)
        grid.imshow(framed.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        grid.set_axis_off()
    axis = panels[-1].add_axes((0.22, 0.14, 0.72, 0.66))
    width = max(1, len(losses) // 100)
    means = torch.tensor(losses)[: len(losses) // width * width].view(-1, width).mean(1)
    axis.plot(range(0, width * len(means), width), means.tolist(), color=accent, linewidth=1.4)
    panels[-1].text(0.22, 0.85, "loss", fontsize=10, color=accent)
    axis.set_xlabel("training step", fontsize=8, color=ink)
    axis.tick_params(labelsize=7, colors=faint, length=2)
    for side in ("top", "left", "right", "bottom"):
        axis.spines[side].set_color("#d8d8de")
    figure.savefig(path, facecolor="white")


def main(arguments: list[str] | None = None) -> None:
    """Train, sample, have the samples read, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("flow_digits"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--samples", type=int, default=50, help="of each class, at least 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = read_data()
    start = time.perf_counter()
    network, losses = train(images, labels, args.steps, args.seed)
    last = losses[-500:]
    print(f"trained in {time.perf_counter() - start:.0f} s, loss {sum(last) / len(last):.4f}")
    wanted = torch.arange(10).repeat_interleave(args.samples)
    samples = draw(network, wanted, args.seed + 1)
    # 0.001 is the customary gamma for pixel values in 0..16, hence 0.064 on the data scale.
    reader = SVC(gamma=0.064).fit(images.flatten(1).numpy(), labels.numpy())
    apart = torch.cdist(images.flatten(1), images.flatten(1)).fill_diagonal_(torch.inf).amin(1)
    print(f"mean distance of a digit to the nearest other digit: {apart.mean():.3f}")
    for name, x in samples.items():
        read = torch.as_tensor(reader.predict(x.flatten(1).numpy()))
        nearest = torch.cdist(x.flatten(1), images.flatten(1)).amin(1).mean()
        print(
            f"{name}: {(read == wanted).float().mean():.3f} of {len(x)} samples are read as their "
            f"class, mean distance to the nearest digit {nearest:.3f}"
        )
    path = args.out / "flow_digits.png"
    heading = f"flow matching on 8x8 digits: the same noise, {EVALUATIONS} network calls a sample"
    picture(path, samples, losses, heading)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
