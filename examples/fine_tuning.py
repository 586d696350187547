# SPDX-License-Identifier: Apache-2.0
"""Trains an adapter of the digits network through its sampler, until its samples are read as a 7.

python examples/fine_tuning.py --out docs/pictures
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

import gradsampler as gs
from gradsampler import models

DIGIT = 7
LEVELS = gs.schedules.karras(10, final="zero")


def adapted() -> tuple[nn.Module, list[nn.Parameter]]:
    """The shipped network with an adapter of rank 4 in its blocks, and what is to be trained."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["expand", "contract"])
    network = inject_adapter_in_model(config, models.load_network())
    return network, [p for p in network.parameters() if p.requires_grad]


def sampled(network: nn.Module, seed: int, count: int) -> Tensor:
    """Unconditional samples [count, 1, 8, 8], differentiable in the parameters."""
    z0 = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return gs.sample(gs.EDM(network, sigma_data=0.75), z0, LEVELS, solver="dpmpp_2m")


def train(updates: int, shown: tuple[int, ...]) -> tuple[list[float], dict[int, Tensor]]:
    """The mean p(7) before each update, and samples of one noise after some of them."""
    network, trained = adapted()
    classifier = models.load_classifier()
    optimizer = torch.optim.Adam(trained, lr=2e-3)
    history, samples = [], {}
    for k in range(updates + 1):
        if k in shown:
            with torch.no_grad():
                samples[k] = sampled(network, 1000, 6)
        logs = classifier(sampled(network, k, 32)).log_softmax(1)[:, DIGIT]
        history.append(logs.exp().mean().item())
        optimizer.zero_grad()
        (-logs.mean()).backward()
        optimizer.step()
    return history, samples


def draw(path: Path, updates: int) -> None:
    """Writes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    history, samples = train(updates, (0, updates // 5, updates))
    figure = Figure(figsize=(7.2, 3.3), dpi=150)
    FigureCanvasAgg(figure)
    tiles, curve = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    axes = tiles.subplots(3, 6)
    tiles.subplots_adjust(0.02, 0.02, 0.99, 0.92, wspace=0.06, hspace=0.2)
    for row, (count, images) in zip(axes, samples.items(), strict=True):
        row[0].set_title(f"after {count} updates", fontsize=8, loc="left")
        for axis, image in zip(row, images[:, 0], strict=True):
            axis.set_axis_off()
            axis.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
    axis = curve.subplots()
    curve.subplots_adjust(0.2, 0.2, 0.96, 0.92)
    axis.plot(history, color="#c2410c", lw=1.5)
    axis.set(xlabel="update", ylabel=f"mean p({DIGIT}) of 32 new samples", ylim=(0, 1.02))
    axis.xaxis.label.set_size(8)
    axis.yaxis.label.set_size(8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "fine-tuning.png", facecolor="white")
    print(f"mean p({DIGIT}) {history[0]:.3f} to {history[-1]:.3f} in {updates} updates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of the picture")
    parser.add_argument("--updates", type=int, default=60)
    arguments = parser.parse_args()
    draw(arguments.out, arguments.updates)
    print(f"wrote {arguments.out / 'fine-tuning.png'}")


if __name__ == "__main__":
    main()
