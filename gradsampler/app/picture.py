# SPDX-License-Identifier: Apache-2.0
"""Pictures of an optimisation, with matplotlib, which is imported only when one is drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gradsampler import _checks
from gradsampler.models import to_pixels

_INK, _FAINT, _ACCENT = "#1b1b1f", "#8a8a94", "#c2410c"


class Reading(NamedTuple):
    """Images and what a classifier reads in them."""

    pixels: Tensor  # [B, 8, 8] in 0 .. 1
    digits: Tensor  # [B] int64
    probabilities: Tensor  # [B] of that digit


@torch.no_grad()
def read(classifier: Callable[[Tensor], Tensor], x: Tensor) -> Reading:
    """Samples [B, 1, 8, 8] as the classifier sees them."""
    probabilities, digits = classifier(x).softmax(1).max(1)
    return Reading(to_pixels(x)[:, 0], digits, probabilities)


def grey(path: Path, size: int) -> Tensor:
    """A picture file as grey values in 0 .. 1, averaged to [1, 1, size, size]."""
    from matplotlib import image

    try:
        pixels = torch.as_tensor(image.imread(path).copy())
    except (OSError, SyntaxError, ValueError) as error:
        _checks.fail("--image", "be a readable picture file", f"{path} ({error})")
    pixels = pixels / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if pixels.ndim == 3:
        pixels = pixels[..., :3].mean(-1)
    return F.adaptive_avg_pool2d(pixels[None, None].float(), size)


def before_after(
    path: Path,
    *,
    before: Reading,
    after: Reading,
    losses: Sequence[float],
    gradients: Sequence[float],
) -> None:
    """Writes a PNG: the samples of the starts, of the optimised noise, and the loss curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(8, len(before.pixels))
    rows = -(-len(before.pixels) // columns)
    figure = Figure(figsize=(0.95 * columns + 0.6, 2 * (1.12 * rows + 0.5) + 2.4), dpi=160)
    FigureCanvasAgg(figure)
    heights = [rows + 0.45, rows + 0.45, 2.1]
    panels: Any = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = panels
    _tiles(top, before, columns, "samples of the starting noise: digit read, its probability")
    _tiles(middle, after, columns, f"samples of the noise after {len(losses)} updates")
    _curves(bottom, losses, gradients)
    figure.savefig(path, facecolor="white")


def _tiles(panel: Any, reading: Reading, columns: int, title: str) -> None:
    panel.suptitle(title, x=0.04, ha="left", fontsize=10, color=_INK)
    rows = -(-len(reading.pixels) // columns)
    axes = panel.subplots(rows, columns, squeeze=False).ravel()
    panel.subplots_adjust(0.04, 0.02, 0.96, 0.84, wspace=0.08, hspace=0.24)
    for axis in axes:
        axis.set_axis_off()
    for axis, pixels, digit, p in zip(axes, *reading, strict=False):
        axis.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(f"{int(digit)}  {float(p):.2f}", fontsize=7, color=_FAINT, pad=2)


def _curves(panel: Any, losses: Sequence[float], gradients: Sequence[float]) -> None:
    axis = panel.subplots()
    panel.subplots_adjust(0.1, 0.24, 0.9, 0.92)
    axis.plot(losses, color=_ACCENT, linewidth=1.6)
    axis.set_xlabel("update", fontsize=8, color=_INK)
    axis.set_ylabel("loss", fontsize=8, color=_ACCENT)
    other = axis.twinx()
    other.plot(gradients, color=_FAINT, linewidth=0.9)
    other.set_ylabel("gradient norm", fontsize=8, color=_FAINT)
    for each in (axis, other):
        each.tick_params(labelsize=7, colors=_FAINT, length=2)
        if min(*losses, *gradients) > 0:
            each.set_yscale("log")
        for side in ("top", "left", "right", "bottom"):
            each.spines[side].set_color("#d8d8de")
