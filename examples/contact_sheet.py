# SPDX-License-Identifier: Apache-2.0
"""Rows of small grey images as one picture; the other examples use it."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def sheet(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Writes a PNG.

    Args:
        path: the file.
        rows: titles, and images [B, 1, H, W] in [0, 1].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(0.62 * columns, 0.86 * len(rows)), dpi=160)
    FigureCanvasAgg(figure)
    for k, (title, images) in enumerate(rows):
        panel = figure.add_axes((0.01, 1 - (k + 1) / len(rows), 0.98, 1 / len(rows)))
        panel.set_axis_off()
        panel.text(0, 0.93, title, fontsize=7, va="top", transform=panel.transAxes)
        for j, image in enumerate(images.detach()):
            tile = panel.inset_axes((j / columns, 0.02, 0.92 / columns, 0.72))
            tile.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
            tile.set_axis_off()
    figure.savefig(path, facecolor="white")
