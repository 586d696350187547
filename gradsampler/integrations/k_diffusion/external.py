# SPDX-License-Identifier: Apache-2.0
"""k-diffusion's wrappers: networks of other projects as denoisers D(x, sigma)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler.integrations.k_diffusion.levels import append_dims, append_zero

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
]

Network = Callable[..., Any]


class _VScalings(nn.Module):
    """What predicts v: Salimans and Ho 2022, arXiv 2202.00512, appendix D, in x = x0 + sigma*e."""

    sigma_data = 1.0

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in at levels [B]."""
        variance = sigma**2 + self.sigma_data**2
        root = variance**0.5
        return self.sigma_data**2 / variance, -sigma * self.sigma_data / root, 1 / root

    def _told(self, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def _predicted(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        raise NotImplementedError

    def _columns(self, x: Tensor, sigma: Tensor) -> list[Tensor]:
        return [append_dims(c, x.ndim) for c in self.get_scalings(sigma)]

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The mean squared error of the network, by sample: [B]."""
        c_skip, c_out, c_in = self._columns(input, sigma)
        noised = input + noise * append_dims(sigma, input.ndim)
        output = self._predicted(noised * c_in, self._told(sigma), **kwargs)
        return (output - (input - c_skip * noised) / c_out).pow(2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised sample of ``input`` [B, *state] at levels ``sigma`` [B]."""
        c_skip, c_out, c_in = self._columns(input, sigma)
        return self._predicted(input * c_in, self._told(sigma), **kwargs) * c_out + input * c_skip


class VDenoiser(_VScalings):
    """A network of v-diffusion-pytorch, in continuous time from 0 to 1.

    Args:
        inner_model: network(x, t, **kwargs) -> v.
    """

    def __init__(self, inner_model: Network) -> None:
        super().__init__()
        self.inner_model = inner_model

    def sigma_to_t(self, sigma: Tensor) -> Tensor:
        """The time of a level."""
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The level of a time."""
        return (t * math.pi / 2).tan()

    def _told(self, sigma: Tensor) -> Tensor:
        return self.sigma_to_t(sigma)

    def _predicted(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model(x, t, **kwargs)
        return output


class DiscreteSchedule(nn.Module):
    """Between continuous levels and the timesteps of a discrete process.

    Args:
        sigmas: [T] rising levels of the timesteps.
        quantize: takes the nearest timestep, an integer without gradient; else timesteps are
            interpolated linearly in log sigma.
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, sigmas: Tensor, quantize: bool) -> None:
        super().__init__()
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self) -> Tensor:
        """The lowest level."""
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        """The highest level."""
        return self.sigmas[-1]

    def get_sigmas(self, n: int | None = None) -> Tensor:
        """Levels for sampling, falling and then 0: n at even timesteps, or all."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        t = torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)
        return append_zero(self.t_to_sigma(t))

    def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
        """The timesteps of levels of any shape."""
        # The logarithm has no derivative at 0, which is below all timesteps.
        log_sigma, table = sigma.clamp(min=torch.finfo(sigma.dtype).tiny).log(), self.log_sigmas
        if self.quantize if quantize is None else quantize:
            return (log_sigma.reshape(-1) - table[:, None]).abs().argmin(0).view(sigma.shape)
        low = torch.searchsorted(table, log_sigma.detach().to(table), right=True) - 1
        low = low.clamp(0, len(table) - 2)
        share = ((log_sigma - table[low]) / (table[low + 1] - table[low])).clamp(0, 1)
        return low + share

    def t_to_sigma(self, t: Tensor) -> Tensor:
        """The levels of timesteps, which need not be whole."""
        t = t.float()
        low, high, share = t.floor().long(), t.ceil().long(), t.frac()
        return torch.exp((1 - share) * self.log_sigmas[low] + share * self.log_sigmas[high])


def _levels(alphas_cumprod: Tensor) -> Tensor:
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """A network of a discrete process that predicts the noise.

    Args:
        model: network(x, t, **kwargs) -> epsilon.
        alphas_cumprod: [T] falling.
        quantize: as of `DiscreteSchedule`.
    """

    sigma_data = 1.0

    def __init__(self, model: Network, alphas_cumprod: Tensor, quantize: bool) -> None:
        super().__init__(_levels(alphas_cumprod), quantize)
        self.inner_model: Any = model

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """c_out and c_in at levels [B]."""
        return -sigma, 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        """The noise that the network predicts."""
        output: Tensor = self.inner_model(*args, **kwargs)
        return output

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The mean squared error of the noise, by sample: [B]."""
        _, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        noised = input + noise * append_dims(sigma, input.ndim)
        eps = self.get_eps(noised * c_in, self.sigma_to_t(sigma), **kwargs)
        return (eps - noise).pow(2).flatten(1).mean(1)

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised sample of ``input`` [B, *state] at levels ``sigma`` [B]."""
        c_out, c_in = (append_dims(c, input.ndim) for c in self.get_scalings(sigma))
        return input + self.get_eps(input * c_in, self.sigma_to_t(sigma), **kwargs) * c_out


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """A network of guided-diffusion with its diffusion object.

    Args:
        model: network(x, t, **kwargs) -> epsilon, and with learned variances these behind it.
        diffusion: has ``alphas_cumprod``.
        quantize: as of `DiscreteSchedule`.
        has_learned_sigmas: drops the second half of the channels.
        device: of the table.
    """

    def __init__(
        self,
        model: Network,
        diffusion: Any,
        quantize: bool = False,
        has_learned_sigmas: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        table = torch.tensor(diffusion.alphas_cumprod, device=device, dtype=torch.float32)
        super().__init__(model, table, quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().get_eps(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """A latent diffusion model of CompVis, called as ``model.apply_model(x, t, cond)``.

    Args:
        model: has ``apply_model`` and ``alphas_cumprod``.
        quantize: as of `DiscreteSchedule`.
        device: of the tables; k-diffusion takes it and lets them lie where the model has them.
    """

    def __init__(
        self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_eps(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model.apply_model(*args, **kwargs)
        return output


class DiscreteVDDPMDenoiser(_VScalings, DiscreteSchedule):
    """A network of a discrete process that predicts v.

    Args:
        model: network(x, t, **kwargs) -> v.
        alphas_cumprod: [T] falling.
        quantize: as of `DiscreteSchedule`.
    """

    def __init__(self, model: Network, alphas_cumprod: Tensor, quantize: bool) -> None:
        DiscreteSchedule.__init__(self, _levels(alphas_cumprod), quantize)
        self.inner_model: Any = model

    def get_v(self, *args: Any, **kwargs: Any) -> Tensor:
        """The v that the network predicts."""
        output: Tensor = self.inner_model(*args, **kwargs)
        return output

    def _told(self, sigma: Tensor) -> Tensor:
        return self.sigma_to_t(sigma)

    def _predicted(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return self.get_v(x, t, **kwargs)


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """A latent diffusion model of CompVis that predicts v; arguments as of `CompVisDenoiser`.

    Of ``extra_args`` it takes ``cond`` alone.
    """

    def __init__(
        self, model: Any, quantize: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, model.alphas_cumprod, quantize)

    def get_v(self, x: Tensor, t: Tensor, cond: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.inner_model.apply_model(x, t, cond)
        return output
