# SPDX-License-Identifier: Apache-2.0
"""Where a classifier's score comes from: its gradient in the sample, and in the noise it began as.

python examples/your_own_network.py --out docs/pictures
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import gradsampler as gs
from gradsampler import models

DIGIT = 7


def gradients() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z0 [B, 1, 8, 8], its sample, and the gradients of log p(7) to the sample and to z0."""
    network, classifier = models.load_network(), models.load_classifier()
    denoiser = gs.EDM(network, sigma_data=network.sigma_data)
    z0 = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    x = gs.sample(denoiser, z0, gs.schedules.karras(18, final="zero"), solver="heun")
    score = classifier(x).log_softmax(1)[:, DIGIT].sum()
    to_x, to_z0 = torch.autograd.grad(score, [x, z0])
    return z0.detach(), x.detach(), to_x, to_z0


def draw(path: Path) -> None:
    """Writes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    z0, x, to_x, to_z0 = gradients()
    names = ("noise z0", "sample x", "gradient to x", "gradient to z0")
    figure = Figure(figsize=(6.4, 4.4), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, len(z0))
    figure.subplots_adjust(0.16, 0.02, 0.99, 0.93, wspace=0.06, hspace=0.06)
    figure.suptitle(
        f"log p({DIGIT}) of six samples, differentiated through 35 model calls", fontsize=9
    )
    for row, (name, images) in zip(
        axes, zip(names, (z0, x, to_x, to_z0), strict=True), strict=True
    ):
        row[0].text(
            -0.12, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=8
        )
        for axis, image in zip(row, images[:, 0], strict=True):
            axis.set_axis_off()
            if name == "sample x":
                axis.imshow(image, cmap="gray_r", vmin=-1, vmax=1)
            else:
                size = image.abs().max()
                axis.imshow(image, cmap="RdBu_r", vmin=-size, vmax=size)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "your-own-network.png", facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("."), help="the folder of the picture")
    arguments = parser.parse_args()
    draw(arguments.out)
    print(f"wrote {arguments.out / 'your-own-network.png'}")


if __name__ == "__main__":
    main()
