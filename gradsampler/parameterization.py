# SPDX-License-Identifier: Apache-2.0
"""How to read a network's output as a clean sample: linear maps, folded into the coefficients.

Every prediction kind is affine in the state and linear in the network's outputs,

    D = c_skip(s) * x + sum_b c_out[b](s) * F_b(c_in(s) * x, c_noise(s))

(Karras et al. 2022, arXiv 2206.00364, eq. 7), so a `Program` can absorb it and no kernel knows of
it. The state is in VE coordinates, ``x = x0 + s*e``; in a native flow run it is
``x = (1-s)*x0 + s*e``. Both satisfy ``dx/ds = (x - D)/s``, which is why one solver serves both.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.coordinates import VE, Coordinates, FlowTime
from gradsampler.elementary import Coefficient, log, sqrt, square

__all__ = [
    "EDM",
    "VP",
    "Coefficient",
    "Flow",
    "Guided",
    "Parameterization",
    "Prediction",
    "parameterize",
]

Network = Callable[..., Tensor]


class Preconditioning(NamedTuple):
    """The coefficients of the affine map at one noise level."""

    c_skip: Coefficient
    c_out: tuple[Coefficient, ...]  # one a network call
    c_in: Coefficient
    c_noise: Coefficient  # what the network is told of the level


class Parameterization(ABC):
    """A network and the affine map that makes a denoiser of it.

    Calling it with (x [B, *state], sigma [B], **cond) gives the denoised sample D [B, *state].
    """

    network: Network
    level_dtype: torch.dtype | None = None  # of c_noise; None is the model's, float32 at least

    @property
    def coordinates(self) -> Coordinates:
        """What the state of a run is made of."""
        return VE()

    @abstractmethod
    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        """The map at the noise level ``sigma``, a float, or float64 levels of any shape."""

    def described(self) -> Hashable | None:
        """All that the affine map depends on, by value; None where that is not known."""
        return None

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Calls the network: x [B, *state] is scaled by c_in, noise [B] holds c_noise."""
        return (self.network(x, noise, **cond),)

    def modules(self) -> Iterator[nn.Module]:
        """The nn.Modules that the network consists of, as far as they can be seen."""
        if isinstance(self.network, nn.Module):
            yield self.network

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        maps = self.preconditioning(sigma.to(torch.float64))
        dtype = torch.promote_types(x.dtype, torch.float32)

        def column(c: Coefficient) -> Coefficient:
            return c.to(dtype).view(-1, *[1] * (x.ndim - 1)) if isinstance(c, Tensor) else c

        noise = torch.as_tensor(maps.c_noise).to(dtype).to(x.device).expand(len(x))
        outputs = self.outputs((column(maps.c_in) * x).to(model_dtype(self, x)), noise, cond)
        denoised = column(maps.c_skip) * x
        for c_out, output in zip(maps.c_out, outputs, strict=True):
            denoised = denoised + column(c_out) * output
        return denoised.to(x.dtype)


@dataclass(frozen=True)
class Prediction(Parameterization):
    """A plain callable (x, sigma, **cond) and what it predicts, without any scaling."""

    network: Network
    kind: str = "x0"  # "x0" | "epsilon" | "v" | "flow"

    @property
    def coordinates(self) -> Coordinates:
        return FlowTime() if self.kind == "flow" else VE()

    def described(self) -> Hashable | None:
        return Prediction, self.kind

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        if self.kind == "x0":
            return Preconditioning(0.0, (1.0,), 1.0, sigma)
        if self.kind == "v":
            # Salimans and Ho 2022, arXiv 2202.00512, appendix D, with x = x_vp/alpha
            variance = square(sigma) + 1
            return Preconditioning(1 / variance, (-sigma / sqrt(variance),), 1.0, sigma)
        # epsilon: x = x0 + s*e. flow: x = (1-s)*x0 + s*e with v = e - x0. Both give D = x - s*out.
        return Preconditioning(1.0, (-sigma,), 1.0, sigma)


KINDS = ("x0", "epsilon", "v", "flow")


@dataclass(frozen=True)
class EDM(Parameterization):
    """Karras preconditioning (Karras et al. 2022, table 1) of network(c_in*x, ln(sigma)/4, **cond).

    Args:
        network: the raw network F.
        sigma_data: standard deviation of the training data.

    Example:
        >>> import torch, gradsampler as gs
        >>> denoiser = gs.EDM(lambda x, noise: torch.zeros_like(x), sigma_data=0.5)
        >>> denoiser(torch.ones(1, 2), torch.tensor([0.5]))  # c_skip is 1/2 at sigma_data
        tensor([[0.5000, 0.5000]])
    """

    network: Network
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _callable("EDM: network", self.network)
        if not _checks.finite("EDM: sigma_data", self.sigma_data) > 0:
            _checks.fail("EDM: sigma_data", "be positive", self.sigma_data)

    def described(self) -> Hashable | None:
        return EDM, self.sigma_data

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        variance = square(sigma) + square(self.sigma_data)
        root = sqrt(variance)
        return Preconditioning(
            square(self.sigma_data) * (1 / variance),
            (sigma * self.sigma_data / root,),
            1 / root,
            log(sigma) / 4,
        )


class VP(Parameterization):
    """A network trained in VP coordinates on discrete timesteps (DDPM, guided-diffusion, SD).

    The network is called with x_vp = x / sqrt(1 + sigma^2) and a timestep; between the timesteps
    the level is interpolated linearly in ln(sigma), as k-diffusion does.

    Args:
        network: network(x_vp [B, *state], timestep [B], **cond).
        alphas_cumprod: [T] decreasing, in (0, 1).
        prediction: "epsilon" | "v" | "x0".
    """

    def __init__(
        self,
        network: Network,
        alphas_cumprod: Tensor,
        prediction: str = "epsilon",
    ) -> None:
        self.network = _callable("VP: network", network)
        self.prediction = _checks.choice("VP: prediction", prediction, ("epsilon", "v", "x0"))
        alphas = _checks.floating("VP: alphas_cumprod", alphas_cumprod).to("cpu", torch.float64)
        if alphas.ndim != 1 or len(alphas) < 2:
            _checks.fail("VP: alphas_cumprod", "have shape [T], T >= 2", list(alphas.shape))
        inside = bool(((alphas > 0) & (alphas < 1)).all())
        if not inside or not bool((alphas.diff() < 0).all()):
            _checks.fail("VP: alphas_cumprod", "decrease within (0, 1)", alphas.tolist()[:4])
        self.log_sigmas = 0.5 * (torch.log1p(-alphas) - torch.log(alphas))  # [T], increasing
        self._table: list[float] = self.log_sigmas.tolist()

    def timestep(self, sigma: Coefficient) -> Coefficient:
        """The timestep of a noise level, fractional between two of the table."""
        log_sigma = log(sigma)
        if not isinstance(log_sigma, Tensor):
            above = min(max(bisect_left(self._table, log_sigma), 1), len(self._table) - 1)
            low, high = self._table[above - 1], self._table[above]
            return above - 1 + min(max((log_sigma - low) / (high - low), 0.0), 1.0)
        table = self.log_sigmas.to(log_sigma.device)
        after = torch.searchsorted(table, log_sigma.detach()).clamp(1, len(table) - 1)
        before, behind = table[after - 1], table[after]
        return after - 1 + ((log_sigma - before) / (behind - before)).clamp(0, 1)

    def described(self) -> Hashable | None:
        return VP, self.prediction, tuple(self._table)

    def _scales(self, sigma: Coefficient) -> tuple[Coefficient, Coefficient]:
        if self.prediction == "x0":
            return 0.0, 1.0
        if self.prediction == "epsilon":
            return 1.0, -sigma
        variance = square(sigma) + 1
        return 1 / variance, -sigma / sqrt(variance)

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        c_skip, c_out = self._scales(sigma)
        return Preconditioning(c_skip, (c_out,), 1 / sqrt(square(sigma) + 1), self.timestep(sigma))


class Flow(Parameterization):
    """A flow-matching network driven by a VE solver: x_t = x/(1+sigma), t = sigma/(1+sigma).

    Args:
        network: network(x_t [B, *state], t [B], **cond) -> velocity e - x0 (Lipman et al. 2023,
            arXiv 2210.02747, with x_t = (1-t)*x0 + t*e).
    """

    def __init__(self, network: Network) -> None:
        self.network = _callable("Flow: network", network)

    def described(self) -> Hashable | None:
        return (Flow,)

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        shrink = 1 / (1 + sigma)
        return Preconditioning(shrink, (-sigma * shrink,), shrink, sigma * shrink)


class Guided(Parameterization):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6), linear as well.

    ``D = (1 - scale) * D(x; unconditional) + scale * D(x; cond)``: two network calls an evaluation,
    two output slots, and the scale in the coefficients.

    Args:
        denoiser: a `Parameterization`, or a callable that predicts x0.
        scale: guidance weight; 1 is the plain conditional model. A 0-d float64 tensor that requires
            grad receives its gradient.
        unconditional: what replaces the entries of ``cond`` in the unconditional call.
    """

    def __init__(
        self,
        denoiser: "Parameterization | Network",
        scale: Coefficient,
        unconditional: Mapping[str, Any],
    ) -> None:
        self.inner = parameterize(denoiser, "x0")
        self.network = self.inner.network
        if isinstance(scale, Tensor):
            _checks.shape("Guided: scale", _checks.floating("Guided: scale", scale), ())
            scale = scale.to("cpu", torch.float64)
        else:
            scale = _checks.finite("Guided: scale", scale)
        if not isinstance(unconditional, Mapping):
            _checks.fail_type("Guided: unconditional", "be a dict", unconditional)
        self.scale = scale
        self.unconditional = dict(unconditional)

    def described(self) -> Hashable | None:
        inner = by_value(self.inner)
        if inner is None or isinstance(self.scale, Tensor):
            return None
        return Guided, inner, self.scale

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        inner = self.inner.preconditioning(sigma)
        plain = tuple((1 - self.scale) * c for c in inner.c_out)
        return inner._replace(c_out=plain + tuple(self.scale * c for c in inner.c_out))

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        plain = self.inner.outputs(x, noise, {**cond, **self.unconditional})
        return plain + self.inner.outputs(x, noise, cond)

    def modules(self) -> Iterator[nn.Module]:
        return self.inner.modules()


def by_value(model: Parameterization) -> Hashable | None:
    """`Parameterization.described`, where the class itself says so and does not inherit it."""
    return model.described() if "described" in vars(type(model)) else None


def parameterize(denoiser: "Parameterization | Network", prediction: str) -> Parameterization:
    """The denoiser as a `Parameterization`; a wrapper says itself how its output is read."""
    if isinstance(denoiser, Parameterization):
        if prediction != "x0":
            _checks.fail(
                "prediction",
                f"be 'x0' for a denoiser wrapped in {type(denoiser).__name__}, which returns x0",
                repr(prediction),
            )
        return denoiser
    if not callable(denoiser):
        _checks.fail_type("denoiser", "be callable as denoiser(x, sigma, **cond)", denoiser)
    return Prediction(denoiser, _checks.choice("prediction", prediction, KINDS))


def _callable(argument: str, network: Any) -> Network:
    if not callable(network):
        _checks.fail_type(argument, "be callable as network(x, level, **cond)", network)
    return cast(Network, network)


def model_dtype(model: Parameterization, z0: Tensor) -> torch.dtype:
    """The dtype that the model is called in: that of all its floating parameters, else z0's."""
    dtypes = {p.dtype for m in model.modules() for p in m.parameters() if p.dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else z0.dtype
