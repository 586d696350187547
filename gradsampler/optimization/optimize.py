# SPDX-License-Identifier: Apache-2.0
"""Optimises initial noise through a whole sampling run."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler._uncompiled import uncompiled
from gradsampler.arguments import Denoiser, checked_levels
from gradsampler.optimization.descent import OptimizeResult, OptimizeStep, check, descend
from gradsampler.optimization.team import Team
from gradsampler.parameterization import Parameterization
from gradsampler.sampling import sample

__all__ = ["OptimizeResult", "OptimizeStep", "optimize"]


@uncompiled
def optimize(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int = 50,
    lr: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    maximize: bool = False,
    regularizer: Callable[[Tensor], Tensor] | None = None,
    projection: Callable[[Tensor], Tensor] | None = None,
    grad_clip: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, str] | None = None,
    progress: bool = False,
    check_finite: bool = True,
    group: Any = None,
    **sample_kwargs: Any,
) -> OptimizeResult:
    """Minimises ``loss(sample(z0)) + regularizer(z0)`` over the initial noise.

    Works on a copy of z0; the caller's tensor stays as it is.

    Args:
        denoiser: as for `sample`.
        z0: [B, *state] start, requiring grad.
        sigmas: [N+1] noise levels, as for `sample`.
        loss: from the sample [B, *state] to a scalar tensor.
        steps: updates of z0.
        lr: learning rate.
        optimizer: called as optimizer([z0], lr=lr).
        maximize: maximises the loss; the regularizer is still a penalty.
        regularizer: from z0 to a scalar penalty, such as `regularizers.ChiNorm`.
        projection: a function that is applied to z0 after each update, such as
            `regularizers.Sphere`.
        grad_clip: largest norm of the gradient that the optimizer gets.
        checkpoint: a file that is saved atomically after each step. If it exists, the run continues
            from it, and on the same machine gives the results of an uninterrupted run, bit for bit.
            If arguments, weights, buffers or code of the denoiser differ from those of the file's
            run, that is an error that names the difference. The loss is not compared.
        identity: further facts that the file's run must agree in, such as a name for the loss. A
            text under the name of an argument is compared in place of that argument.
        progress: shows a bar with loss and gradient norm.
        check_finite: raises NonFiniteError before a NaN or an infinity reaches z0.
        group: a process group, such as ``torch.distributed.group.WORLD``. All its ranks make this
            call with the same arguments and share the batch: each optimises its own samples, with
            the step noises that these have in the whole batch. Tensors in ``start`` and ``cond``
            with a row for each sample are cut as z0 is. Loss and regularizer must be means over the
            samples that they get; then the results are those of one process, up to rounding. The
            first rank shows the bar and writes the file, from which any number of ranks can
            continue. All ranks return the whole result and history. An error on one rank is raised
            on all.
        **sample_kwargs: passed on to `sample`.

    Returns:
        The noise, its sample, and the history with an entry for each step.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; also for a checkpoint file
            that is truncated, of another kind, or of another run.
        NonFiniteError: z0 and the checkpoint are those of the last good step.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.ones(2, 3, requires_grad=True)
        >>> levels = gs.schedules.karras(5)
        >>> found = gs.optimize(lambda x, sigma: 0.1 * x, z0, levels, lambda x: x.square().sum(),
        ...                     steps=3, solver="heun")
        >>> found.history[-1].loss < found.history[0].loss
        True
    """
    check(z0, steps, lr, grad_clip, optimizer, loss, regularizer, projection)
    levels = checked_levels(sigmas, flow=sample_kwargs.get("prediction") == "flow")
    sample_kwargs["check_finite"] = check_finite
    team = Team(group, len(z0))
    options = team.options(denoiser, levels, sample_kwargs)
    return descend(
        lambda noise: sample(denoiser, noise, sigmas, **options),
        z0,
        loss,
        {"denoiser": denoiser, "sigmas": levels, **_settings(sample_kwargs)},
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        maximize=maximize,
        regularizer=regularizer,
        projection=projection,
        grad_clip=grad_clip,
        checkpoint=checkpoint,
        identity=identity,
        progress=progress,
        check_finite=check_finite,
        team=team,
    )


def _settings(sample_kwargs: Mapping[str, Any]) -> dict[str, object]:
    """What the numbers of a run depend on, defaults of `sample` included."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(sample).parameters.items()
        if parameter.default is not parameter.empty
    }
    return {k: v for k, v in (defaults | dict(sample_kwargs)).items() if k not in _WATCHING}


_WATCHING = ("callback", "progress", "check_finite", "monitor")  # change no number
