# SPDX-License-Identifier: Apache-2.0
"""The images of an optimisation as files."""

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks

__all__ = ["Pictures"]


class Pictures:
    """A folder that gets the images of every k-th step, side by side.

    Args:
        folder: made where it does not exist.
        every: k.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int) -> None:
        if not isinstance(folder, str | os.PathLike):
            _checks.fail_type("pictures", "be a path", folder)
        self._folder, self._every = Path(folder), every
        if self._folder.exists() and not self._folder.is_dir():
            _checks.fail("pictures", "be a folder", f"the file {self._folder}")
        self._folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: int, images: Tensor) -> None:
        """Writes ``step-0000.png`` if it is its turn; of a video, the frame in the middle."""
        if step % self._every:
            return
        if images.ndim == 5:
            images = images[:, images.shape[1] // 2]
        row = torch.cat(list(images.detach().float().cpu().clamp(0, 1)), dim=-1)
        pixels = (
            (255 * row).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).contiguous().numpy()
        )
        image: Any = importlib.import_module("PIL.Image")
        image.fromarray(pixels).save(self._folder / f"step-{step:04d}.png")
