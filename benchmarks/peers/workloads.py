# SPDX-License-Identifier: Apache-2.0
"""What the peers are compared on: a network, a state, levels, and one update formula."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

import gradsampler as gs

NoisesOf = Callable[[Tensor], Iterable[Tensor]]


class Preconditioned(nn.Module):
    """The preconditioning of Karras et al. 2022, eq. 7, with sigma_data = 1, around a network.

    Every peer calls this one module, (x [B, *state], sigma [B]) -> D of x's shape.
    """

    def __init__(self, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.to(x.dtype)
        s = sigma.view(-1, *[1] * (x.ndim - 1))
        root = (s * s + 1).sqrt()
        return x / root**2 + s / root * self.network(x / root, sigma.log() / 4)


class Perceptron(nn.Module):
    """Two hidden layers of 64 units over 64 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(65, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.layers(torch.cat([x, noise[:, None]], 1))


class Convolutions(nn.Module):
    """Three convolutions of 32 channels over 4."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 32, 32, 4]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.layers(x + noise.view(-1, 1, 1, 1))


class Elementwise(nn.Module):
    """As good as no network: what remains is the arithmetic of the sampler."""

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return torch.sin(x)


def unet() -> nn.Module:
    """A UNet2DModel of diffusers with 5.7 million parameters, without dropout."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=64,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
    )
    return Called(model)


class Called(nn.Module):
    """A diffusers model as a function of x and the noise level."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.model(x, noise * 250).sample


def euler(x: Tensor, denoised: Tensor, s: float, t: float) -> Tensor:
    """Euler's method on dx/ds = (x - D)/s."""
    return x + (t - s) / s * (x - denoised)


@dataclass(frozen=True)
class Workload:
    """One comparison: every peer computes d mean(x^2) / d z0 of the same run."""

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    steps: int
    method: str = "euler"  # | "euler_maruyama" | "dpmpp_2m_sde"
    rounds: int = 5
    span: tuple[float, float] = (0.02, 20.0)

    @property
    def title(self) -> str:
        """As rows have it."""
        return f"{self.name} {'x'.join(map(str, self.shape))} N={self.steps} {self.method}"

    @property
    def levels(self) -> Tensor:
        """[N+1] noise levels, float64."""
        if self.method == "euler_maruyama":
            return gs.schedules.exponential(self.steps, *self.span)
        return gs.schedules.karras(self.steps, *self.span)

    @cache  # noqa: B019, a workload lives as long as the process
    def denoiser(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with its preconditioning, frozen; the same weights in each dtype."""
        torch.manual_seed(0)
        made = Preconditioned(self.network()).eval().requires_grad_(False)
        return copy.deepcopy(made).to(dtype)

    def z0(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The start, the same numbers in each dtype; a new leaf each time."""
        drawn = torch.randn(self.shape, generator=torch.Generator().manual_seed(0))
        return drawn.to(dtype).requires_grad_()

    def loop(
        self,
        denoiser: nn.Module,
        z0: Tensor,
        noises: NoisesOf | None = None,
        around: Callable[..., Tensor] = lambda step, *arguments: step(*arguments),
    ) -> Tensor:
        """The run as a user writes it, in the dtype of z0; ``around`` calls each step."""
        levels = self.levels.tolist()
        supply = None if noises is None else (each.to(z0.dtype) for each in noises(z0))
        x = levels[0] * z0
        if self.method == "dpmpp_2m_sde":
            return multistep(denoiser, x, levels, supply)
        for s, t in pairwise(levels):
            noise = None if supply is None else next(supply)
            x = around(self.step, denoiser, x, s, t, noise)
        return x

    def step(
        self, denoiser: nn.Module, x: Tensor, s: float, t: float, noise: Tensor | None
    ) -> Tensor:
        """One step of a method with one call a step."""
        denoised = denoiser(x, x.new_full((x.shape[0],), s))
        if self.method == "euler":
            return euler(x, denoised, s, t)
        rate = math.log(s / t)  # of the levels, times the length of the step
        return x - 2 * rate * (x - denoised) + s * (2 * rate) ** 0.5 * noise

    @cache  # noqa: B019, once for all peers that inject the same
    def exact(self, noises: NoisesOf | None) -> Tensor:
        """The gradient by the loop in float64, with the noises that a peer injected."""
        z0 = self.z0(torch.float64)
        return gradient(self.loop(self.denoiser(torch.float64), z0, noises), z0)


def multistep(
    denoiser: nn.Module, x: Tensor, levels: list[float], supply: Iterator[Tensor]
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, appendix), as published: midpoint form, eta = 1."""
    last = h_last = None
    for s, t in pairwise(levels):
        denoised = denoiser(x, x.new_full((x.shape[0],), s))
        h = math.log(s / t)
        gain = -math.expm1(-2 * h)
        x = t / s * math.exp(-h) * x + gain * denoised
        if last is not None:
            x = x + gain * h / (2 * h_last) * (denoised - last)
        x = x + t * gain**0.5 * next(supply)
        last, h_last = denoised, h
    return x


def gradient(x: Tensor, z0: Tensor) -> Tensor:
    """Of the loss that all are measured by."""
    (found,) = torch.autograd.grad(x.square().mean(), z0)
    return found


WORKLOADS = (
    Workload("perceptron", Perceptron, (16, 64), 256),
    Workload("perceptron", Perceptron, (16, 64), 256, "euler_maruyama"),
    Workload("convolutions", Convolutions, (1, 4, 128, 128), 32),
    Workload("UNet2DModel", unet, (1, 3, 64, 64), 5, rounds=3),
    Workload("video latent", Elementwise, (1, 16, 8, 60, 104), 20),
    Workload("video latent", Elementwise, (1, 16, 8, 60, 104), 20, "dpmpp_2m_sde"),
)
SMALL = (
    Workload("perceptron", Perceptron, (2, 64), 16, rounds=1),
    Workload("perceptron", Perceptron, (2, 64), 16, "euler_maruyama", rounds=1),
    Workload("video latent", Elementwise, (1, 4, 2, 4, 4), 6, "dpmpp_2m_sde", rounds=1),
)
