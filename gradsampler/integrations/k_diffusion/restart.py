# SPDX-License-Identifier: Apache-2.0
"""The restart sampler of AUTOMATIC1111's web UI."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.observer import StepInfo
from gradsampler.integrations.k_diffusion.levels import get_sigmas_karras
from gradsampler.integrations.k_diffusion.run import Callback, Model, Run, Sampler, Told
from gradsampler.memory import Memory
from gradsampler.solvers import (
    Restart,
)


class Counted(Told):
    """Counts the steps down alone, and calls the level that one leads to sigma."""

    def __call__(self, info: StepInfo) -> None:
        """Tells of a step down."""
        levels = self.sigmas.detach()
        down = levels[1:] <= levels[:-1]
        self.callback(
            {
                "x": info.x,
                "i": int(down[: info.step].sum()),
                "sigma": levels[info.step + 1],
                "sigma_hat": levels[info.step],
                "denoised": info.denoised,
            }
        )


def restart_sampler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: Coefficient = 1.0,
    restart_list: Mapping[float, Sequence[float]] | None = None,
    *,
    noise_sampler: Sampler = None,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """Restart (Xu et al. 2023, arXiv 2306.14878) with Heun's method, as the web UI has it.

    Args:
        restart_list: {level: [number of levels on the way down, how often, level to go up to]},
            both taken at the nearest of ``sigmas``. None is the web UI's choice by the number of
            steps, with Karras's levels between the ends of ``sigmas`` in place of the others.
        callback: its dict has the level that the step leads to as sigma, as the web UI's.
    """
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    levels = restarted(_checks.floating("sigmas", sigmas), restart_list)
    return run.along(levels, Restart(s_noise=s_noise), noise_sampler, told=Counted)


def restarted(sigmas: Tensor, restart_list: Mapping[float, Sequence[float]] | None) -> Tensor:
    """The levels of `restart_sampler`, rising where it restarts."""
    steps = len(sigmas) - 1
    if restart_list is None:
        restart_list = {}
        if steps >= 20:
            again, times = (steps // 4, 2) if steps >= 36 else (9, 1)
            ends = sigmas[-2], sigmas[0]
            sigmas = get_sigmas_karras(steps - again * times, *ends, device=sigmas.device)
            restart_list = {0.1: [again + 1, times, 2]}

    def nearest(level: float) -> int:
        return int((sigmas.detach() - level).abs().argmin())

    restarts = {nearest(low): value for low, value in restart_list.items()}
    pieces = []
    for i, level in enumerate(sigmas.split(1)):
        pieces.append(level)
        if i not in restarts:
            continue
        count, often, top = restarts[i]
        high = nearest(top)
        if high < i:
            down = get_sigmas_karras(int(count), sigmas[i], sigmas[high], device=sigmas.device)
            pieces += [sigmas[high : high + 1], down[1:-2].to(sigmas), level] * int(often)
    return torch.cat(pieces)
