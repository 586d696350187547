# SPDX-License-Identifier: Apache-2.0
"""The levels that an adaptive solver chooses in a run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.arguments import Denoiser, checked_levels
from gradsampler.engine.conditioning import Conditioning
from gradsampler.engine.live import Live
from gradsampler.noise.sources import NoiseSource, SignedRoll
from gradsampler.parameterization import Parameterization, parameterize
from gradsampler.repetition import RandomState
from gradsampler.solvers import Churn
from gradsampler.solvers.adaptive import Adaptive


def adapted(
    solver: Adaptive,
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    start: Tensor | None = None,
    prediction: str = "x0",
    noise: NoiseSource | None = None,
    churn: Churn | None = None,
    cond: Mapping[str, Any] | None = None,
    state_dtype: torch.dtype | None = None,
    modules: Sequence[nn.Module] = (),
) -> Tensor:
    """The given levels with the chosen ones in place of those in between.

    The ends may require grad; what lies between them is taken as given. Torch's default generators
    are left as they were.
    """
    name = type(solver).__name__
    if churn is not None:
        _checks.fail("churn", f"be None with {name}, which chooses its levels", churn)
    model = parameterize(denoiser, prediction).naming(modules)
    levels = checked_levels(sigmas, flow=prediction == "flow")
    if levels.ndim == 2:
        _checks.fail("sigmas", f"have shape [N+1] with {name}", list(levels.shape))
    source = SignedRoll(seed=0) if noise is None else noise
    if not isinstance(source, NoiseSource):
        _checks.fail_type("noise", "be a gradsampler.noise object or None", noise)
    Conditioning(cond)
    if solver.stochastic and source.needs_length:
        expected = f"not depend on the number of steps, which {name} finds in the run"
        _checks.fail("noise", expected, type(source).__name__, "take SignedRoll or Philox")
    values: list[float] = levels.tolist()
    if math.isinf(values[0]):
        _checks.fail("sigmas[0]", f"be finite with {name}", "infinity")
    if start is not None:
        _checks.shape("start", _checks.floating("start", start), z0.shape)
    dtype = state_dtype or torch.promote_types(z0.dtype, torch.float32)
    x = z0.detach().to(dtype)
    first = values[0] * x if start is None else start.detach().to(dtype)
    ends = 2 if values[-1] == 0 else 1
    if len(values) == ends:
        return levels
    before = RandomState(z0.device)
    try:
        trials = solver.tried(Live(model, x, source, cond), first, values)
    finally:
        before.restore()
    inner = levels.new_tensor([trial.t for trial in trials if trial.accepted][:-1])
    return torch.cat([levels[:1], inner, levels[-ends:]])
