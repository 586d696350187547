# SPDX-License-Identifier: Apache-2.0
"""Whether the initial noise can be standard normal, by the energy of each sample."""

import math
import warnings

import torch
from torch import Tensor

from gradsampler import _checks, transforms

SIGMAS = 6.0  # standard deviations that chance is given; 2e-9 of the samples lie beyond


class NoiseWarning(UserWarning):
    """The injected noise is computed from a z0 that is clearly not standard normal.

    Args:
        mean_square: of the sample of z0 that is farthest off; that of standard normal noise is 1.
    """

    def __init__(self, mean_square: float) -> None:
        # Without numbers, so that Python shows it once for a loop over changing z0.
        super().__init__(
            "the noise that this run injects is made of z0, whose mean square is not that of "
            "standard normal noise: the noise is off by as much. Give a state that is not noise "
            "alone as start=, and standard normal noise as z0"
        )
        self.mean_square = mean_square

    def __reduce__(self) -> tuple[type["NoiseWarning"], tuple[float]]:
        return NoiseWarning, (self.mean_square,)


class Energy:
    """The mean square of each sample of z0, against the chi-square distribution.

    Its cube root is close to normal, also for a few elements (Wilson and Hilferty 1931, "The
    distribution of chi-square", PNAS 17). On an accelerator the numbers are computed beside the
    run, and waited for at its end.
    """

    def __init__(self, z0: Tensor) -> None:
        self._worst: Tensor | None = None
        self._done: torch.Event | None = None
        if z0.is_meta or transforms.active() or torch.compiler.is_compiling():
            return  # there are no numbers to look at
        with torch.no_grad():
            flat = z0.detach().flatten(1)
            dtype = torch.promote_types(flat.dtype, torch.float32)
            square = torch.linalg.vector_norm(flat, dim=1, dtype=dtype) ** 2 / flat.shape[1]
            spread = 2 / (9 * flat.shape[1])
            off = (square ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
            worst = off.abs().argmax()
            self._worst = torch.stack((off[worst], square[worst])).to("cpu", non_blocking=True)
        if z0.device.type != "cpu":
            self._done = torch.get_device_module(z0.device).Event()
            self._done.record()

    def judge(self) -> None:
        """Warns where a sample's energy is beyond chance."""
        if self._worst is None:
            return
        if self._done is not None:
            self._done.synchronize()
        deviation, mean_square = self._worst.tolist()
        if abs(deviation) > SIGMAS:
            warnings.warn(NoiseWarning(mean_square), stacklevel=_checks.callers())
