# SPDX-License-Identifier: Apache-2.0
"""How large is the gradient at each step of a run, and where does it come from?"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.arguments import Denoiser
from gradsampler.engine.monitor import Monitor, MonitoredCall
from gradsampler.parameterization import Parameterization
from gradsampler.policies import resolve
from gradsampler.sampling import Gradient, sample

__all__ = ["draw", "health"]

_INK, _FAINT, _ACCENT, _OTHER = "#1b1b1f", "#8a8a94", "#c2410c", "#0f766e"


def health(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    loss: Callable[[Tensor], Tensor],
    *,
    gradient: Gradient = None,
    picture: str | os.PathLike[str] | None = None,
    **sample_kwargs: Any,
) -> Monitor:
    """Runs a sampler and the backward of a loss, and measures the gradient at each step.

    Printing the result shows a table with a line for each model call: the norm of the gradient
    ``lam`` with respect to the state, its parts through the state itself, through the network and
    through injected noise, and the gain of the denoiser's Jacobian along it. It also names the
    first value that is not finite. There are no model calls but those of the run and its backward.

    Args:
        denoiser, sigmas, sample_kwargs: as for `sample`; with a ``memory`` other than "store" where
            ``gradient`` is given.
        z0: [B, *state] start; it stays as it is.
        loss: from the sample [B, *state] to a scalar tensor.
        gradient: a policy of `gradsampler.policies`, or a list of them. Its gradient is computed as
            well, in the same model calls, and compared with the exact one: at each step, and at z0,
            cond, parameters and start.
        picture: a file for `draw`.

    Returns:
        A `Monitor`: its `calls`, its `cosines`, its `first_nonfinite`.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0, levels = torch.ones(1, 2), [2.0, 1.0, 0.5]
        >>> policy, denoiser = gs.policies.DetachedInput(), lambda x, sigma: 0.5 * x
        >>> print(gs.health(denoiser, z0, levels, lambda x: x.sum(), gradient=policy))
        step  sigma   |lam|  by state  by network  by noise  gain  |lam| beside  cosine
           0      2  0.7955    0.5303      0.2652         -   0.5        0.3536       1
           1      1   1.061    0.7071      0.3536         -   0.5        0.7071       1
        cosine to the gradient of the run: z0 1
    """
    z0 = _checks.batched("z0", z0).detach().requires_grad_()
    if not callable(loss):
        _checks.fail_type("loss", "be callable as loss(sample)", loss)
    monitor = Monitor(None if gradient is None else resolve(gradient))
    x = sample(denoiser, z0, sigmas, **(sample_kwargs | {"monitor": monitor}))
    value = loss(x)
    if not isinstance(value, Tensor) or value.shape != ():
        _checks.fail_type("loss: the value that it returns", "be a scalar tensor", value)
    if x.requires_grad and value.requires_grad:
        torch.autograd.grad(value, z0, allow_unused=True)
    if picture is not None:
        draw(monitor, picture)
    return monitor


def draw(monitor: Monitor, path: str | os.PathLike[str]) -> None:
    """Writes a PNG of a monitor's calls: norms of the cotangent above, the gain below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    calls = monitor.calls
    figure = Figure(figsize=(6.4, 4.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    shares = [("lam", "|lam|", _INK), ("state", "by the state", _FAINT)]
    shares += [("network", "by the network", _ACCENT), ("noise", "by noise", _OTHER)]
    for name, label, colour in shares:
        _curve(above, calls, name, label, colour)
    _curve(below, calls, "gain", "gain of the denoiser's Jacobian", _ACCENT)
    if monitor.beside is not None:
        _curve(above, calls, "beside", f"|lam|, {type(monitor.beside).__name__}", _INK, dashed=True)
        _curve(below, calls, "cosine", "cosine of the two", _OTHER)
    above.set_yscale("log")
    below.set_xlabel("model call", fontsize=8, color=_INK)
    for axis in (above, below):
        axis.tick_params(labelsize=7, colors=_FAINT, length=2)
        if axis.lines:
            axis.legend(fontsize=7, frameon=False)
        for side in ("top", "left", "right", "bottom"):
            axis.spines[side].set_color("#d8d8de")
    figure.savefig(os.fspath(path), format="png", facecolor="white")


def _curve(
    axis: Any,
    calls: Sequence[MonitoredCall],
    name: str,
    label: str,
    colour: str,
    *,
    dashed: bool = False,
) -> None:
    values = [(k, getattr(call, name)) for k, call in enumerate(calls)]
    points = [(k, y) for k, y in values if math.isfinite(y)]
    if points:
        style = "--" if dashed else "-"
        axis.plot(*zip(*points, strict=True), style, label=label, color=colour, linewidth=1.4)
