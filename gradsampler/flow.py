# SPDX-License-Identifier: Apache-2.0
"""Training of flow-matching networks: times to train at, and what to learn there.

Flow time runs from 0, data, to 1, noise: ``x_t = (1-t) x0 + t x1``, and a network learns the
velocity ``x1 - x0``. Times for sampling are in `gradsampler.schedules.flow`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks, ops
from gradsampler.noise import philox

__all__ = ["Pair", "logit_normal", "shift_times", "training_pair"]


class Pair(NamedTuple):
    """A training example: from x_t and t the network should predict v."""

    x_t: Tensor  # [B, *state] between data and noise
    t: Tensor  # [B] flow times
    x1: Tensor  # [B, *state] the noise
    v: Tensor  # [B, *state] the velocity


def shift_times(t: Tensor, shift: float | Tensor) -> Tensor:
    """Flow times pushed towards the noise: ``t' = m t / (1 + (m-1) t)``.

    Esser et al. 2024, arXiv 2403.03206, eq. 23. In the logit of t it is a translation by ln m; 0
    and 1 are kept exactly. Differentiable in both arguments.

    Args:
        t: flow times in [0, 1], floating, of any shape.
        shift: m above 0; 1 changes nothing. A float, or a tensor broadcastable to t.

    Returns:
        Times of t's shape and dtype.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> import torch
        >>> from gradsampler import flow
        >>> flow.shift_times(torch.tensor([0.0, 0.5, 1.0]), 3.0)
        tensor([0.0000, 0.7500, 1.0000])
    """
    t = _checks.floating("shift_times: t", t)
    if isinstance(shift, Tensor):
        shift = _checks.floating("shift_times: shift", shift).to(t)
    elif not _checks.finite("shift_times: shift", shift) > 0:
        _checks.fail("shift_times: shift", "be above 0", shift)
    # 1 + (m-1) t as (1-t) + m t, which is exactly m at t = 1.
    return shift * t / ((1 - t) + shift * t)


def logit_normal(
    count: int,
    shift: float = 1.0,
    *,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random times to train at: ``t = sigmoid(N(0, 1))``, then `shift_times`.

    Esser et al. 2024, arXiv 2403.03206, eq. 19. With the shift m the logits are N(ln m, 1).

    Args:
        count: B, at least 1.
        shift: m above 0.
        seed: of `noise.Philox` at step 1, so that the noise of `training_pair` may have the same
            seed. None draws from torch's default generator, in float32.
        dtype: of the times; computed in float32 at least.
        device: where they are; None is the CPU.

    Returns:
        [count] times in [0, 1].

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> from gradsampler import flow
        >>> t = flow.logit_normal(4, shift=2.0, seed=0)
        >>> t.shape, bool(((0 < t) & (t < 1)).all())
        (torch.Size([4]), True)
    """
    count = _checks.integer("logit_normal: count", count, 1)
    if not dtype.is_floating_point:
        _checks.fail("logit_normal: dtype", "be a floating-point dtype", str(dtype))
    compute = torch.promote_types(dtype, torch.float32)
    place = torch.device(device or "cpu")
    if seed is None:
        normals = torch.randn(count, dtype=torch.float32, device=place).to(compute)
    else:
        seed = _checks.integer("logit_normal: seed", seed, 0)
        normals = philox.normals(count, 1, seed, compute, place)
    return shift_times(torch.sigmoid(normals), shift).to(dtype)


def training_pair(
    x0: Tensor,
    t: Tensor,
    x1: Tensor | None = None,
    *,
    sigma_min: float = 1e-5,
    seed: int | None = None,
    backend: str | None = None,
) -> Pair:
    """Data on its way to noise, and the velocity there, by `ops.flow_pair` in one pass.

    ``x_t = r x0 + (1 - (1-sigma_min) r) x1`` with ``r = 1-t``, ``v = (1-sigma_min) x1 - x0``
    (Lipman et al. 2023, arXiv 2210.02747, equations 22 and 23, with time reversed). Gradients reach
    x0, t and x1.

    Args:
        x0: [B, *state] data.
        t: [B] flow times in [0, 1].
        x1: [B, *state] standard normal, or None to draw it.
        sigma_min: standard deviation left at t = 0.
        seed: of `noise.Philox` at step 0, to draw x1 from. None draws from torch's default
            generator. Either way drawn in float32 at least and cast to x0's dtype.
        backend: "reference", or None for the fastest present.

    Returns:
        x_t, t, x1 and v; x_t and v of x0's dtype, computed in float32 at least.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> import torch
        >>> from gradsampler import flow
        >>> pair = flow.training_pair(torch.ones(2, 3), flow.logit_normal(2, seed=0), seed=0)
        >>> pair.x_t.shape, pair.v.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    x0 = _checks.batched("training_pair: x0", x0)
    if x1 is None and seed is None:
        x1 = torch.randn(x0.shape, dtype=torch.float32, device=x0.device).to(x0.dtype)
    x_t, x1, v = ops.flow_pair(x0, t, x1, sigma_min=sigma_min, seed=seed, backend=backend)
    return Pair(x_t, t, x1, v)
