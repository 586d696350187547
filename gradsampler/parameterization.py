# SPDX-License-Identifier: Apache-2.0
"""How to read a network's output as a clean sample: linear maps, folded into the coefficients.

Every prediction kind is affine in the state and linear in the network's outputs,

    D = c_skip(s) * x + sum_b c_out[b](s) * F_b(c_in(s) * x, c_noise(s))

(Karras et al. 2022, arXiv 2206.00364, eq. 7), so a `Program` can absorb it and no kernel knows of
it. The state is in VE coordinates, ``x = x0 + s*e``; in a native flow run it is
``x = (1-s)*x0 + s*e``. Both satisfy ``dx/ds = (x - D)/s``, which is why one solver serves both.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from gradsampler import _checks, transforms
from gradsampler.coordinates import VE, Coordinates, FlowTime
from gradsampler.elementary import Coefficient, log, sqrt, square
from gradsampler.timesteps import Timesteps

__all__ = [
    "EDM",
    "VP",
    "Coefficient",
    "Flow",
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
    branches: tuple[tuple[Coefficient, ...], ...] = ()  # c_out of each prediction D is made of


class Parameterization(ABC):
    """A network and the affine map that makes a denoiser of it.

    Calling it with (x [B, *state], sigma [B], **cond) gives the denoised sample D [B, *state].
    """

    network: Network
    behind: tuple[nn.Module, ...] = ()  # modules that a plain callable hides
    keeps_shape: ClassVar[bool] = True  # whether outputs have the shape of the state

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

    def limit(self) -> Preconditioning:
        """The map where sigma is infinite and a state is noise alone, as a map of x/sigma."""
        _checks.fail(
            "sigmas[0]",
            f"be finite for a network wrapped in {type(self).__name__}",
            "infinity",
            "VP with a v or x0 prediction and Flow can start from noise alone",
        )

    def reading(self, prediction: str) -> "Parameterization":
        """The parameterization with a network that predicts something else than x0."""
        _checks.fail(
            "prediction",
            f"be 'x0' for a denoiser wrapped in {type(self).__name__}, which returns x0",
            repr(prediction),
        )

    def on(self, sigmas: Tensor) -> "Parameterization":
        """The parameterization on the levels of a run, [N+1] float64; tables are checked here."""
        return self

    def at(self, step: int) -> "Parameterization":
        """The parameterization in one step of a run; most are the same in all."""
        return self

    @property
    def width(self) -> int:
        """How many outputs an evaluation has."""
        return 1

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Calls the network: x [B, *state] is scaled by c_in, noise [B] holds c_noise."""
        return (self.network(x, noise, **cond),)

    def chosen(
        self, x: Tensor, noise: Tensor, cond: Mapping[str, Any], branches: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Those of `outputs` that a run reads, by ascending index."""
        outputs = self.outputs(x, noise, cond)
        if len(outputs) <= max(branches):
            got = f"{type(self).__name__} with {len(outputs)} outputs"
            _checks.fail("denoiser", "be the one that the program was recorded with", got)
        return outputs if len(outputs) == len(branches) else tuple(outputs[b] for b in branches)

    def modules(self) -> Iterator[nn.Module]:
        """The nn.Modules that the network consists of, as far as they can be seen or are named."""
        if isinstance(self.network, nn.Module):
            yield self.network
        yield from self.behind

    def naming(self, modules: Sequence[nn.Module]) -> Self:
        """The same, with the modules that its network, a plain callable, consists of."""
        checked_modules("modules", modules)
        if not modules:
            return self
        named = copy.copy(self)
        object.__setattr__(named, "behind", (*self.behind, *modules))
        return named

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        """The denoised sample of x [B, *state] at levels sigma [B]."""
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


@dataclass(frozen=True, init=False)
class EDM(Parameterization):
    """Karras preconditioning (Karras et al. 2022, table 1) of network(c_in*x, ln(sigma)/4, **cond).

    Args:
        network: the raw network F.
        sigma_data: standard deviation of the training data.
        modules: the nn.Modules behind a network that is a plain callable, so that its dtype,
            buffers and generators are known.

    Example:
        >>> import torch, gradsampler as gs
        >>> denoiser = gs.EDM(lambda x, noise: torch.zeros_like(x), sigma_data=0.5)
        >>> denoiser(torch.ones(1, 2), torch.tensor([0.5]))  # c_skip is 1/2 at sigma_data
        tensor([[0.5000, 0.5000]])
    """

    network: Network
    sigma_data: float = 0.5

    def __init__(
        self, network: Network, sigma_data: float = 0.5, *, modules: Sequence[nn.Module] = ()
    ) -> None:
        object.__setattr__(self, "network", checked_network("EDM: network", network))
        if not _checks.finite("EDM: sigma_data", sigma_data) > 0:
            _checks.fail("EDM: sigma_data", "be positive", sigma_data)
        object.__setattr__(self, "sigma_data", sigma_data)
        object.__setattr__(self, "behind", checked_modules("EDM: modules", modules))

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

    A run may start from noise alone where the process ends in it (zero terminal signal-to-noise
    ratio, Lin et al. 2023, arXiv 2305.08891): ``sigmas[0]`` is then infinite, and so is the level
    of an ``alphas_cumprod[-1]`` of 0.

    Args:
        network: network(x_vp [B, *state], timestep [B], **cond).
        alphas_cumprod: [T] decreasing, in (0, 1); the last may be 0.
        prediction: "epsilon" | "v" | "x0".
        timesteps: [N] or [N+1] timesteps that the network gets at each level of a run of N steps,
            as some projects round them; see `Timesteps`. None computes them from the levels.
        modules: as of `EDM`.
    """

    def __init__(
        self,
        network: Network,
        alphas_cumprod: Tensor,
        prediction: str = "epsilon",
        *,
        timesteps: Tensor | Sequence[float] | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.network = checked_network("VP: network", network)
        self.prediction = _checks.choice("VP: prediction", prediction, ("epsilon", "v", "x0"))
        alphas = _checks.floating("VP: alphas_cumprod", alphas_cumprod).to("cpu", torch.float64)
        if alphas.ndim != 1 or len(alphas) < 2:
            _checks.fail("VP: alphas_cumprod", "have shape [T], T >= 2", list(alphas.shape))
        inside = bool((alphas[:-1] > 0).all()) and bool(alphas[-1] >= 0) and bool(alphas[0] < 1)
        if not inside or not bool((alphas.diff() < 0).all()):
            _checks.fail("VP: alphas_cumprod", "decrease within (0, 1)", alphas.tolist()[:4])
        self.log_sigmas = 0.5 * (torch.log1p(-alphas) - torch.log(alphas))  # [T], increasing
        self.timesteps = None if timesteps is None else Timesteps("VP", timesteps)
        self.behind = checked_modules("VP: modules", modules)

    def on(self, sigmas: Tensor) -> "VP":
        return self if self.timesteps is None else _placed(self, sigmas, self._formula)

    def timestep(self, sigma: Coefficient) -> Coefficient:
        """The timestep of a noise level; by the formula fractional between two of the process."""
        return _told(self.timesteps, self._formula, sigma)

    def _formula(self, sigma: Tensor) -> Tensor:
        table = self.log_sigmas.to(sigma.device)
        tiny = torch.finfo(sigma.dtype).tiny  # at level 0 the logarithm has no derivative
        log_sigma = torch.log(sigma.clamp(min=tiny))
        above = torch.searchsorted(table, log_sigma.detach()).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        between = ((log_sigma - low) / (high - low)).clamp(0, 1)
        return above - 1 + torch.where(torch.isinf(sigma), 1.0, between)

    def described(self) -> Hashable | None:
        if self.timesteps is not None:
            return None
        return VP, self.prediction, tuple(self.log_sigmas.tolist())

    def _scales(self, sigma: Coefficient) -> tuple[Coefficient, Coefficient]:
        if self.prediction == "x0":
            return 0.0, 1.0
        if self.prediction == "epsilon":
            return 1.0, -sigma
        variance = square(sigma) + 1
        return 1 / variance, -sigma / sqrt(variance)

    def limit(self) -> Preconditioning:
        if self.prediction == "epsilon":
            _checks.fail(
                "sigmas[0]",
                "be finite for VP with an epsilon prediction",
                "infinity, where epsilon says nothing of the sample",
                "v and x0 predictions can start from noise alone",
            )
        last = float(len(self.log_sigmas) - 1)
        noise = last if self.timesteps is None else self.timesteps.first
        return Preconditioning(0.0, (1.0 if self.prediction == "x0" else -1.0,), 1.0, noise)

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        c_skip, c_out = self._scales(sigma)
        return Preconditioning(c_skip, (c_out,), 1 / sqrt(square(sigma) + 1), self.timestep(sigma))


class Flow(Parameterization):
    """A flow-matching network driven by a VE solver: x_t = x/(1+sigma), t = sigma/(1+sigma).

    Args:
        network: network(x_t [B, *state], t [B], **cond) -> velocity e - x0 (Lipman et al. 2023,
            arXiv 2210.02747, with x_t = (1-t)*x0 + t*e).
        timesteps: [N] or [N+1] numbers that the network gets in place of t at each level of a run
            of N steps, as some projects scale and round them; see `Timesteps`. None is t.
        modules: as of `EDM`.

    At an infinite level, which is t = 1, the state is noise alone.
    """

    def __init__(
        self,
        network: Network,
        *,
        timesteps: Tensor | Sequence[float] | None = None,
        modules: Sequence[nn.Module] = (),
    ) -> None:
        self.network = checked_network("Flow: network", network)
        self.timesteps = None if timesteps is None else Timesteps("Flow", timesteps)
        self.behind = checked_modules("Flow: modules", modules)

    def on(self, sigmas: Tensor) -> "Flow":
        return self if self.timesteps is None else _placed(self, sigmas, self._formula)

    def _formula(self, sigma: Tensor) -> Tensor:
        return torch.where(torch.isinf(sigma), 1.0, sigma / (1 + sigma))

    def limit(self) -> Preconditioning:
        noise = 1.0 if self.timesteps is None else self.timesteps.first
        return Preconditioning(1.0, (-1.0,), 1.0, noise)

    def described(self) -> Hashable | None:
        return None if self.timesteps is not None else (Flow,)

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        shrink = 1 / (1 + sigma)
        told = _told(self.timesteps, self._formula, sigma)
        return Preconditioning(shrink, (-sigma * shrink,), shrink, told)


Tabled = TypeVar("Tabled", VP, Flow)


def _told(
    table: Timesteps | None, formula: Callable[[Tensor], Tensor], sigma: Coefficient
) -> Coefficient:
    """What the network is told at a level, by the formula or by the table beside it."""
    numbers = formula(torch.as_tensor(sigma, dtype=torch.float64))
    told = numbers if table is None else table.told(numbers)
    return told if isinstance(sigma, Tensor) or transforms.followed(told) else told.item()


def _placed(model: Tabled, sigmas: Tensor, formula: Callable[[Tensor], Tensor]) -> Tabled:
    """The model with its table of timesteps on the levels of a run."""
    assert model.timesteps is not None
    placed = copy.copy(model)
    placed.timesteps = model.timesteps.on([formula(sigma) for sigma in sigmas.unbind()])
    return placed


def by_value(model: Parameterization) -> Hashable | None:
    """`Parameterization.described`, where the class itself says so and does not inherit it."""
    return model.described() if "described" in vars(type(model)) else None


def parameterize(denoiser: Parameterization | Network, prediction: str) -> Parameterization:
    """The denoiser as a `Parameterization`; a wrapper says itself how its output is read."""
    if isinstance(denoiser, Parameterization):
        _checks.choice("prediction", prediction, KINDS)
        return denoiser if prediction == "x0" else denoiser.reading(prediction)
    if not callable(denoiser):
        _checks.fail_type("denoiser", "be callable as denoiser(x, sigma, **cond)", denoiser)
    return Prediction(denoiser, _checks.choice("prediction", prediction, KINDS))


def checked_network(argument: str, network: Any) -> Network:
    """The network, if it can be called."""
    if not callable(network):
        _checks.fail_type(argument, "be callable as network(x, level, **cond)", network)
    return cast(Network, network)


def checked_modules(argument: str, modules: Any) -> tuple[nn.Module, ...]:
    """The modules behind a network, as a tuple."""
    if not isinstance(modules, Sequence) or not all(isinstance(m, nn.Module) for m in modules):
        _checks.fail_type(argument, "be a list of nn.Modules", modules)
    return tuple(modules)


def model_dtype(model: Parameterization, z0: Tensor) -> torch.dtype:
    """The dtype that the model is called in: that of all its floating parameters, else z0's."""
    # Eight bits are for storage: layers that hold such weights compute in a dtype of their own.
    dtypes = {p.dtype for m in model.modules() for p in m.parameters()} & set(_checks.FLOATING)
    return dtypes.pop() if len(dtypes) == 1 else z0.dtype
