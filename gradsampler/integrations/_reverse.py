# SPDX-License-Identifier: Apache-2.0
"""One step of a discrete diffusion in reverse: a network's output read, guided, and stepped on."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradsampler import _checks, ops
from gradsampler.engine.trajectory import GradientWarning
from gradsampler.integrations._posterior import (
    MEAN_TYPES,
    VAR_TYPES,
    Posterior,
    Table,
    checked_betas,
    named,
    respaced_betas,
)
from gradsampler.iteration import Watch
from gradsampler.noise.sources import NoiseSource


class GuidanceWarning(GradientWarning):
    """The result of cond_fn at ``step`` does not depend differentiably on its input."""

    def __init__(self, step: int) -> None:
        UserWarning.__init__(
            self,
            f"cond_fn detaches at step {step}: no gradient passes from its result to x, so that of "
            "the guidance is left out; differentiate by x itself, not by a detached copy, and with "
            "create_graph=True",
        )
        self.step = step


Network = Callable[..., Tensor]
Denoised = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """What a step is made with: the functions and options of guided-diffusion's methods."""

    model: Network
    clip_denoised: bool = True
    denoised_fn: Denoised | None = None
    cond_fn: Network | None = None
    model_kwargs: Mapping[str, Any] | None = None
    eta: float | None = None  # of DDIM; None is ancestral sampling
    watch: Watch = field(default_factory=Watch)

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """The keyword arguments of model and cond_fn."""
        return self.model_kwargs or {}


class StepNoise(NamedTuple):
    """The noise that a step draws: of a source, or of torch's generator as guided-diffusion's."""

    source: NoiseSource | None
    z0: Tensor  # [B, *state] what the source is a function of
    num_steps: int

    def draw(self, x: Tensor, t: Tensor) -> Tensor | None:
        """Noise [B, *state] for timesteps [B] on the CPU; None where no sample takes any."""
        if self.source is None:
            # Drawn whether it is used or not: the generator then goes on as guided-diffusion's.
            drawn = torch.randn_like(x)
            return drawn if t.any() else None
        if not t.any():
            return None
        steps = [self.num_steps - 1 - k for k in t.tolist()]
        draws = {
            step: self.source.at(self.z0, step, self.num_steps)
            for step in sorted({*steps} - {self.num_steps - 1})
        }
        if len(draws) == 1:
            return next(iter(draws.values()))
        nothing = torch.zeros_like(self.z0)
        return torch.stack([draws.get(step, nothing)[b] for b, step in enumerate(steps)])


class Reverse(Posterior):
    """The reverse process ``p(x_{t-1} | x_t)`` by a network, of any mean and variance type.

    Timesteps ``t`` of its methods are [B] int64 on the CPU, as `Posterior._timesteps` returns them.
    """

    def __init__(
        self,
        betas: Tensor | Sequence[float] | Table,
        model_mean_type: object,
        model_var_type: object,
        rescale_timesteps: bool,
        use_timesteps: Iterable[int] | None,
    ) -> None:
        self.model_mean_type = named("model_mean_type", model_mean_type, MEAN_TYPES)
        self.model_var_type = named("model_var_type", model_var_type, VAR_TYPES)
        self.rescale_timesteps = bool(rescale_timesteps)
        table = checked_betas(betas)
        self.original_num_steps = len(table)
        self.timestep_map = list(range(len(table)))
        if use_timesteps is not None:
            table, self.timestep_map = respaced_betas(table, use_timesteps)
        super().__init__(table)
        self._ancestral = self._ancestral_coefficients(self.model_mean_type, self.model_var_type)

    @property
    def use_timesteps(self) -> set[int]:
        """The timesteps of the original process that are visited."""
        return set(self.timestep_map)

    def _told(self, t: Tensor, device: torch.device) -> Tensor:
        """The timesteps [B] as a network is told them."""
        if bool((t == t[0]).all()):  # filled on the device: a copy to it would stall the host
            original = torch.full(t.shape, self.timestep_map[int(t[0])], device=device)
        else:
            original = torch.tensor(self.timestep_map)[t].to(device)
        if self.rescale_timesteps:
            return original.float() * (1000.0 / self.original_num_steps)
        return original

    def _step_of(self, t: Tensor) -> int:
        return self.num_timesteps - 1 - int(t[0])

    def _output(self, call: Call, x: Tensor, t: Tensor) -> Tensor:
        """Calls the model: [B, C, *space], or [B, 2C, *space] with learned variances."""
        output = call.model(x, self._told(t, x.device), **call.kwargs)
        name, channels = "model: the output", x.shape[1]
        if self.model_var_type.startswith("learned"):
            channels = 2 * channels
        expected = [len(x), channels, *x.shape[2:]]
        if list(_checks.floating(name, output).shape) != expected:
            why = f"as x has {list(x.shape)} and model_var_type is {self.model_var_type!r}"
            hint = "learned variances take twice the channels of x, fixed ones as many"
            _checks.fail(name, f"have shape {expected}, {why}", list(output.shape), hint)
        call.watch.look(GradientWarning, x, output, self._step_of(t))
        return _checks.device(name, output, x.device)

    def _gradient(
        self, cond_fn: Network, kwargs: Mapping[str, Any], watch: Watch, x: Tensor, t: Tensor
    ) -> Tensor:
        """Calls cond_fn: the gradient [B, C, *space] of a log probability, float32 at least."""
        gradient = cond_fn(x, self._told(t, x.device), **kwargs)
        name = "cond_fn: the result"
        _checks.shape(name, _checks.floating(name, gradient), x.shape)
        watch.look(GuidanceWarning, x, gradient, self._step_of(t))
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32))

    def _xstart(self, call: Call, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The clean sample that the network predicts, after denoised_fn and clamp."""
        r1, r2 = (self._at(table, t, x) for table in self._readings(self.model_mean_type))
        x0 = r1 * x - r2 * output[:, : x.shape[1]]
        if call.denoised_fn is not None:
            x0 = call.denoised_fn(x0)
            _checks.shape("denoised_fn: the result", x0, x.shape)
        return x0.clamp(-1, 1) if call.clip_denoised else x0

    def _moments(self, call: Call, output: Tensor, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Mean, variance and predicted clean sample of ``p(x_{t-1} | x_t)``."""
        x0 = self._xstart(call, output, x, t)
        predicts_mean = self.model_mean_type == "previous_x"
        mean = output[:, : x.shape[1]] if predicts_mean else self._mean(x0, x, t)
        high, low = (self._at(table, t, x) for table in self._log_variances(self.model_var_type))
        if self.model_var_type == "learned":
            log_variance = output[:, x.shape[1] :]
        elif self.model_var_type == "learned_range":
            fraction = (output[:, x.shape[1] :] + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
        else:
            log_variance = high.expand(x.shape)
        fixed = self._fixed.get(self.model_var_type)
        return {
            "mean": mean,
            "variance": (
                log_variance.exp() if fixed is None else self._at(fixed, t, x).expand(x.shape)
            ),
            "log_variance": log_variance,
            "pred_xstart": x0,
        }

    def _shifted(self, x0: Tensor, t: Tensor, gradient: Tensor) -> Tensor:
        """The clean sample with the score shifted by ``gradient`` (arXiv 2105.05233, alg. 2).

        ``epsilon - sqrt(1 - a) gradient``, read as x_0, adds ``(1 - a)/sqrt(a) gradient`` to it.
        """
        kept = self.alphas_cumprod
        return x0 + self._at((1 - kept) / self.sqrt_alphas_cumprod, t, x0) * gradient

    def _step(
        self, call: Call, x: Tensor, t: Tensor, noise: StepNoise, *, xstart: bool = True
    ) -> dict[str, Tensor]:
        """From x_t to x_{t-1}; without ``xstart`` the prediction may be left out."""
        output = self._output(call, x, t)
        if call.eta is not None:
            return self._implicit(call, call.eta, output, x, t, noise)
        if call.denoised_fn is not None or call.cond_fn is not None:
            return self._explicit(call, output, x, t, noise)
        # The mean of previous_x is the output itself, which no clamp of x0 changes.
        bounds = (-1.0, 1.0) if call.clip_denoised else None
        sample = ops.ancestral_step(
            x,
            output,
            _rows(self._ancestral[t], x),
            noise.draw(x, t),
            nonzero=_nonzero(t, x),
            clamp=None if self.model_mean_type == "previous_x" else bounds,
        )
        prediction = {"pred_xstart": self._xstart(call, output, x, t)} if xstart else {}
        return {"sample": sample, **prediction}

    def _explicit(
        self, call: Call, output: Tensor, x: Tensor, t: Tensor, noise: StepNoise
    ) -> dict[str, Tensor]:
        """The ancestral step through its moments, which denoised_fn and cond_fn change."""
        moments = self._moments(call, output, x, t)
        drawn, mean = noise.draw(x, t), moments["mean"]
        if call.cond_fn is not None:
            gradient = self._gradient(call.cond_fn, call.kwargs, call.watch, x, t)
            mean = mean + moments["variance"] * gradient
        if drawn is not None:
            logs = moments["log_variance"]
            mean = ops.reparameterize(mean, logs, drawn, nonzero=_nonzero(t, x))
        return {"sample": mean, "pred_xstart": moments["pred_xstart"]}

    def _implicit(
        self, call: Call, eta: float, output: Tensor, x: Tensor, t: Tensor, noise: StepNoise
    ) -> dict[str, Tensor]:
        """The DDIM step (Song, Meng and Ermon 2021, arXiv 2010.02502, equations 12 and 16)."""
        x0 = self._xstart(call, output, x, t)
        if call.cond_fn is not None:
            gradient = self._gradient(call.cond_fn, call.kwargs, call.watch, x, t)
            x0 = self._shifted(x0, t, gradient)
        drawn = noise.draw(x, t)
        here, there = self.alphas_cumprod[t.numpy()], self.alphas_cumprod_prev[t.numpy()]
        sigma = eta * np.sqrt((1 - there) / (1 - here)) * np.sqrt(1 - here / there)
        sample = self._toward(there, sigma, x, x0, t, drawn if eta > 0 else None)
        return {"sample": sample, "pred_xstart": x0}

    def _toward(
        self, there: Table, sigma: Table, x: Tensor, x0: Tensor, t: Tensor, noise: Tensor | None
    ) -> Tensor:
        """``sqrt(a') x0 + sqrt(1 - a' - sigma^2) epsilon + sigma noise`` as one stage.

        ``there`` [B] holds a', ``alpha_bar`` after the step.
        """
        here = self.alphas_cumprod[t.numpy()]
        along = np.sqrt(np.maximum(1 - there - sigma**2, 0.0) / (1 - here))
        columns = [np.sqrt(there) - along * np.sqrt(here), along]
        terms = [x0, x]
        if noise is not None:
            columns, terms = [*columns, sigma], [*terms, noise]
        coefs = torch.from_numpy(np.stack(columns, axis=-1))
        return ops.step(terms, _rows(coefs, x), out_dtype=x0.dtype)


def _rows(rows: Tensor, x: Tensor) -> list[float] | Tensor:
    """Coefficients [B, K] of each sample, or K floats where all samples have the same."""
    if bool((rows == rows[0]).all()):
        numbers: list[float] = rows[0].tolist()
        return numbers
    return rows.to(x.device, torch.promote_types(x.dtype, torch.float32))


def _nonzero(t: Tensor, x: Tensor) -> Tensor | None:
    """The factor [B] that takes the noise from samples at t = 0, where others have some."""
    return None if bool(t.all()) else (t != 0).to(x.device, x.dtype)
