# SPDX-License-Identifier: Apache-2.0
"""A discrete Gaussian diffusion as tables over its timesteps, in float64 on the host."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsampler import _checks

Table = np.ndarray[Any, np.dtype[np.float64]]

MEAN_TYPES = {"EPSILON": "epsilon", "START_X": "x0", "PREVIOUS_X": "previous_x"}
VAR_TYPES = {
    name.upper(): name for name in ("fixed_small", "fixed_large", "learned", "learned_range")
}


class Posterior:
    """The process ``q(x_t | x_0)`` and its posterior ``q(x_{t-1} | x_t, x_0)``.

    Ho et al. 2020, arXiv 2006.11239, equations 4 to 7. Timestep t = 0 is the least noisy one. Each
    table is a float64 array [T] under the name that it has in guided-diffusion.

    Args:
        betas: [T] variances, each strictly between 0 and 1.
    """

    def __init__(self, betas: Tensor | Sequence[float] | Table) -> None:
        self.betas: Table = checked_betas(betas)
        self.num_timesteps = len(self.betas)
        alphas = 1.0 - self.betas
        kept: Table = np.cumprod(alphas).astype(np.float64)
        self.alphas_cumprod = kept
        self.alphas_cumprod_prev: Table = np.append(1.0, kept[:-1])
        self.alphas_cumprod_next: Table = np.append(kept[1:], 0.0)
        self.sqrt_alphas_cumprod: Table = np.sqrt(kept)
        self.sqrt_one_minus_alphas_cumprod: Table = np.sqrt(1.0 - kept)
        self.sqrt_recip_alphas_cumprod: Table = np.sqrt(1.0 / kept)
        self.sqrt_recipm1_alphas_cumprod: Table = np.sqrt(1.0 / kept - 1)

        share = (1.0 - self.alphas_cumprod_prev) / (1.0 - kept)
        self.posterior_variance: Table = self.betas * share
        # The first variance is 0 and has no logarithm: the second stands in for it.
        floor = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance_clipped: Table = np.log(
            np.append(floor, self.posterior_variance[1:])
        )
        self.posterior_mean_coef1: Table = (
            self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - kept)
        )
        self.posterior_mean_coef2: Table = share * np.sqrt(alphas)
        self._fixed: dict[str, Table] = {
            "fixed_small": self.posterior_variance,
            "fixed_large": np.append(floor, self.betas[1:]),
        }

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The posterior ``q(x_{t-1} | x_t, x_0)`` (arXiv 2006.11239, equations 6 and 7).

        Args:
            x_start: [B, C, *space] clean sample x_0.
            x_t: [B, C, *space] state at timestep t.
            t: [B] integer timesteps.

        Returns:
            Mean, variance and log variance, each [B, C, *space]. The log variance of t = 0, where
            the variance is 0, is that of t = 1.

        Raises:
            ValueError, TypeError: naming the argument that does not fit.

        Example:
            >>> import torch
            >>> from gradsampler.integrations.guided_diffusion import GaussianDiffusion
            >>> x = torch.ones(1, 1, 2)
            >>> diffusion = GaussianDiffusion([0.5, 0.5])
            >>> diffusion.q_posterior_mean_variance(0 * x, x, torch.tensor([1]))[1]
            tensor([[[0.3333, 0.3333]]])
        """
        t = self._timesteps(t, x_t)
        _checks.shape("x_start", _checks.floating("x_start", x_start), x_t.shape)
        variance = self._at(self.posterior_variance, t, x_t).expand(x_t.shape)
        log_variance = self._at(self.posterior_log_variance_clipped, t, x_t).expand(x_t.shape)
        return self._mean(x_start, x_t, t), variance, log_variance

    def _mean(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``c1 x_0 + c2 x_t``; ``t`` as `_timesteps` returns it."""
        c1, c2 = self.posterior_mean_coef1, self.posterior_mean_coef2
        return self._at(c1, t, x_t) * x_start + self._at(c2, t, x_t) * x_t

    def _at(self, table: Table, t: Tensor, x: Tensor) -> Tensor:
        """The entries of a table for timesteps [B] on the CPU, as a column that multiplies ``x``.

        [B, 1, ...] on x's device, of its dtype, float32 at least.
        """
        entries = torch.from_numpy(table)[t]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return entries.to(x.device, dtype).view(-1, *[1] * (x.ndim - 1))

    def _timesteps(self, t: Tensor, x: Tensor) -> Tensor:
        """``t`` [B] as int64 on the CPU, if it holds a timestep for each sample of ``x``."""
        x = _checks.batched("x", x)
        if not isinstance(t, Tensor):
            _checks.fail_type("t", "be a torch.Tensor", t)
        if t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool:
            _checks.fail("t", "have an integer dtype", str(t.dtype))
        t = _checks.shape("t", t, (len(x),)).to("cpu", torch.int64)
        if not bool(((t >= 0) & (t < self.num_timesteps)).all()):
            expected = f"hold timesteps of at least 0 and below {self.num_timesteps}"
            _checks.fail("t", expected, t.tolist())
        return t

    def _readings(self, mean_type: str) -> tuple[Table, Table]:
        """(r1, r2) of ``x_0 = r1 x_t - r2 output`` for what the network predicts."""
        if mean_type == "epsilon":
            return self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod
        if mean_type == "x0":
            return np.zeros_like(self.betas), -np.ones_like(self.betas)
        c1, c2 = self.posterior_mean_coef1, self.posterior_mean_coef2
        return -c2 / c1, -1.0 / c1  # the posterior mean, solved for x_0

    def _log_variances(self, var_type: str) -> tuple[Table, Table]:
        """(log_max, log_min), between which ``f = (v+1)/2`` interpolates; equal where it is fixed.

        Nichol and Dhariwal 2021, arXiv 2102.09672, equation 15.
        """
        small = self.posterior_log_variance_clipped
        if var_type == "learned":  # then f log_max + (1-f) log_min is v itself
            return np.ones_like(small), -np.ones_like(small)
        if var_type == "learned_range":
            return np.log(self.betas), small
        fixed = small if var_type == "fixed_small" else np.log(self._fixed[var_type])
        return fixed, fixed

    def _ancestral_coefficients(self, mean_type: str, var_type: str) -> Tensor:
        """[T, 6] float64: what `gradsampler.ops.ancestral_step` wants at each timestep."""
        logs = self._log_variances(var_type)
        means = (self.posterior_mean_coef1, self.posterior_mean_coef2)
        readings = self._readings(mean_type)
        if mean_type == "previous_x":  # the output is the mean
            readings, means = self._readings("x0"), (np.ones_like(logs[0]), np.zeros_like(logs[0]))
        return torch.from_numpy(np.stack([*readings, *means, *logs], axis=-1))


def checked_betas(betas: Tensor | Sequence[float] | Table) -> Table:
    """The variances as a float64 array [T] of their own."""
    if isinstance(betas, Tensor):
        if betas.requires_grad:
            _checks.fail("betas", "not require grad, as tables are made of them", "a leaf or more")
        betas = betas.cpu().numpy()
    try:
        table: Table = np.array(betas, dtype=np.float64)
    except (TypeError, ValueError):
        _checks.fail_type("betas", "be a sequence of numbers", betas)
    if table.ndim != 1 or len(table) == 0:
        _checks.fail("betas", "have shape [T] with at least one timestep", list(table.shape))
    outside = ~((table > 0) & (table < 1))
    if outside.any():
        k = int(outside.argmax())
        _checks.fail("betas", "lie strictly between 0 and 1", f"betas[{k}] = {table[k]}")
    return table


def respaced_betas(betas: Table, use_timesteps: Iterable[int]) -> tuple[Table, list[int]]:
    """The variances of the process that visits some timesteps only, and those in order.

    Its ``alpha_bar`` are the original ones (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 19).
    """
    if isinstance(use_timesteps, str) or not isinstance(use_timesteps, Iterable):
        expected = "be a set of timesteps, as gradsampler.schedules.respace makes it"
        _checks.fail_type("use_timesteps", expected, use_timesteps)
    kept = sorted({_checks.integer("use_timesteps: each", t, 0) for t in use_timesteps})
    if not kept:
        _checks.fail("use_timesteps", "hold at least one timestep", kept)
    if kept[-1] >= len(betas):
        expected = f"be below {len(betas)}, the number of betas"
        _checks.fail("use_timesteps: each", expected, kept[-1])
    alphas_cumprod = np.cumprod(1.0 - betas)[kept]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]), kept


def named(argument: str, value: object, types: Mapping[str, str]) -> str:
    """The name of a mean or variance type, given as that or as guided-diffusion's enum member."""
    if isinstance(value, enum.Enum):
        return types[_checks.choice(argument, value.name, types)]
    return _checks.choice(argument, value, types.values())
