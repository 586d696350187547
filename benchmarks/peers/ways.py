# SPDX-License-Identifier: Apache-2.0
"""The ways to a gradient through a run, each as its users write it.

A way gets a workload, and returns the gradient to z0 and the noises that it injected as a function
of z0, for the loop in float64 that it is compared with; a run without noise returns None.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from gradsampler import elementary
from gradsampler.noise import NoiseSource
from peers.workloads import NoisesOf, Workload, gradient

Found = tuple[Tensor, NoisesOf | None]
Way = Callable[[Workload], Found]
SEED = 7


# A loop of one's own.


def drawn(z0: Tensor) -> Iterator[Tensor]:
    """Noise from a generator, as a loop draws it."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        yield torch.randn(z0.shape, generator=generator)


def own(work: Workload) -> NoisesOf | None:
    """The noises of a loop; None where the method injects nothing."""
    return None if work.method == "euler" else drawn


def autograd(work: Workload) -> Found:
    """Autograd through the loop."""
    z0 = work.z0()
    return gradient(work.loop(work.denoiser(), z0, own(work)), z0), own(work)


def checkpointed(work: Workload) -> Found:
    """`torch.utils.checkpoint` around each step."""
    z0, around = work.z0(), partial(checkpoint, use_reentrant=False)
    return gradient(work.loop(work.denoiser(), z0, own(work), around), z0), own(work)


def on_cpu(work: Workload) -> Found:
    """`torch.autograd.graph.save_on_cpu` around the loop."""
    with torch.autograd.graph.save_on_cpu():
        return autograd(work)


# Ours.


@dataclass(frozen=True)
class EulerMaruyama(gs.solvers.Solver):
    """Euler and Maruyama's method on the reverse SDE; levels fall by a constant factor."""

    stochastic = True

    def step(self, run, x, s, t):
        x, denoised = run.denoise(x, s)
        rate = elementary.log(s / t)
        return x - 2 * rate * (x - denoised) + s * (2 * rate) ** 0.5 * run.noise()


def ours(memory: str, noise: NoiseSource | None = None) -> Way:
    """`gs.sample`."""

    def way(work: Workload) -> Found:
        z0 = work.z0()
        solver = EulerMaruyama() if work.method == "euler_maruyama" else work.method
        options = {"solver": solver, "memory": memory, "noise": noise}
        x = gs.sample(work.denoiser(), z0, work.levels, **options)
        if noise is None:
            return gradient(x, z0), None
        return gradient(x, z0), lambda z: (noise.at(z, i, work.steps) for i in range(work.steps))

    return way


# diffusers.


def diffusers_euler(work: Workload) -> Found:
    """`EulerDiscreteScheduler.step` in a loop with gradients on."""
    from diffusers import EulerDiscreteScheduler

    scheduler, levels = EulerDiscreteScheduler(prediction_type="sample"), work.levels.float()
    scheduler.set_timesteps(work.steps)
    scheduler.sigmas, scheduler.timesteps = levels, torch.arange(work.steps).float()
    scheduler.is_scale_input_called = True  # the network has a scaling of its own
    z0, denoiser = work.z0(), work.denoiser()
    x = levels[0] * z0
    for s, t in zip(levels, scheduler.timesteps, strict=False):
        x = scheduler.step(denoiser(x, s.expand(len(x))), t, x).prev_sample
    return gradient(x, z0), None


def diffusers_sde(work: Workload) -> Found:
    """`DPMSolverMultistepScheduler.step`, which holds the state in VP coordinates."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        prediction_type="sample",
        lower_order_final=False,
        final_sigmas_type="sigma_min",  # "zero" makes the last step one of first order
    )
    scheduler.set_timesteps(work.steps)
    levels = work.levels.float()
    scheduler.sigmas, scheduler.timesteps = levels, torch.arange(work.steps)
    z0, denoiser = work.z0(), work.denoiser()
    generator = torch.Generator().manual_seed(SEED)
    scales = (1 + levels**2).rsqrt()
    x = scales[0] * levels[0] * z0
    for s, scale, t in zip(levels, scales, scheduler.timesteps, strict=False):
        denoised = denoiser(x / scale, s.expand(len(x)))
        x = scheduler.step(denoised, t, x, generator=generator).prev_sample
    return gradient(x / scales[-1], z0), drawn


# k-diffusion.


@cache
def k_diffusion() -> types.ModuleType:
    """Its sampling module, without the parts of the package that want torchvision and wandb."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    assert spec.origin is not None
    package, parts = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = [str(Path(spec.origin).parent)]
    parts.append_dims = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]
    package.utils = parts
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": parts}
    return importlib.import_module("k_diffusion.sampling")


def k_euler(work: Workload) -> Found:
    """`sample_euler` without the `torch.no_grad` around it."""
    z0, levels = work.z0(), work.levels.float()
    run = k_diffusion().sample_euler.__wrapped__
    return gradient(run(work.denoiser(), levels[0] * z0, levels, disable=True), z0), None


def k_sde(work: Workload, tree: bool) -> Found:
    """`sample_dpmpp_2m_sde` without its `torch.no_grad`, with a Brownian tree or randn."""
    z0, levels = work.z0(), work.levels.float()
    module = k_diffusion()

    def sampler() -> Callable[..., Tensor]:
        if tree:
            ends = 0.999 * levels[-1], 1.001 * levels[0]  # torchsde rounds these and no others
            return module.BrownianTreeNoiseSampler(z0.detach(), *ends, seed=SEED)
        supply = drawn(z0)
        return lambda s, t: next(supply)

    run = module.sample_dpmpp_2m_sde.__wrapped__
    x = run(work.denoiser(), levels[0] * z0, levels, disable=True, noise_sampler=sampler())
    again = sampler()
    return gradient(x, z0), lambda z: (again(s, t) for s, t in pairwise(levels))


# torchdiffeq and torchsde.


class Slope(nn.Module):
    """dx/ds = (x - D)/s, as torchdiffeq wants it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, s: Tensor, x: Tensor) -> Tensor:
        return (x - self.denoiser(x, s.expand(len(x)))) / s


def diffeq(work: Workload, adjoint: bool) -> Found:
    """torchdiffeq's Euler on the same levels; the adjoint solves backward on them as well."""
    import torchdiffeq

    levels = work.levels.float()

    def grid(slope: object, x: Tensor, ends: Tensor) -> Tensor:
        found = levels if ends[0].abs() > ends[-1].abs() else levels.flip(0)
        return found.copysign(ends[0])  # torchdiffeq turns time around by its sign

    z0, slope = work.z0(), Slope(work.denoiser())
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    options = {"method": "euler", "options": {"grid_constructor": grid}}
    if adjoint:
        options["adjoint_params"] = ()
    x = solve(slope, levels[0] * z0, levels[[0, -1]], **options)[-1]
    return gradient(x, z0), None


class Reverse(nn.Module):
    """The reverse SDE in u from 0 to 1 on levels that fall by a constant factor, for torchsde."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.denoiser, self.top = work.denoiser(), work.levels[0].item()
        self.rate = (work.levels[0] / work.levels[-1]).log().item()

    def level(self, u: Tensor | float) -> Tensor:
        return self.top * torch.exp(-self.rate * torch.as_tensor(u))

    def f(self, u: Tensor, x: Tensor) -> Tensor:
        return -2 * self.rate * (x - self.denoiser(x, self.level(u).expand(len(x))))

    def g(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.level(u) * (2 * self.rate) ** 0.5).expand_as(x)


def sde(work: Workload, adjoint: bool) -> Found:
    """torchsde's Euler; its adjoint reconstructs the path from a Brownian interval."""
    import torchsde

    def path() -> torchsde.BrownianInterval:
        return torchsde.BrownianInterval(0.0, 1.0, size=work.shape, entropy=SEED)

    z0, process = work.z0(), Reverse(work)
    solve = torchsde.sdeint_adjoint if adjoint else torchsde.sdeint
    ends = torch.tensor([0.0, 1.0])
    options = {"bm": path(), "method": "euler", "dt": 1 / work.steps}
    x = solve(process, process.top * z0, ends, **options)[-1]
    found = gradient(x, z0)
    again, times = path(), [k / work.steps for k in range(work.steps + 1)]
    scale = work.steps**0.5
    return found, lambda z: (scale * again(a, b) for a, b in pairwise(times))


WAYS: dict[str, dict[str, Way]] = {
    "euler": {
        "autograd": autograd,
        "torch.utils.checkpoint": checkpointed,
        "save_on_cpu": on_cpu,
        "diffusers EulerDiscreteScheduler": diffusers_euler,
        "k-diffusion sample_euler": k_euler,
        "torchdiffeq odeint": partial(diffeq, adjoint=False),
        "torchdiffeq odeint_adjoint": partial(diffeq, adjoint=True),
        "gradsampler store": ours("store"),
        "gradsampler auto": ours("auto"),
        "gradsampler checkpoint": ours("checkpoint"),
        "gradsampler revolve:8": ours("revolve:8"),
    },
    "euler_maruyama": {
        "autograd": autograd,
        "torch.utils.checkpoint": checkpointed,
        "torchsde sdeint": partial(sde, adjoint=False),
        "torchsde sdeint_adjoint": partial(sde, adjoint=True),
        "gradsampler store, Philox": ours("store", gs.noise.Philox()),
        "gradsampler checkpoint, Philox": ours("checkpoint", gs.noise.Philox()),
        "gradsampler checkpoint, SignedRoll": ours("checkpoint", gs.noise.SignedRoll()),
    },
    "dpmpp_2m_sde": {
        "autograd": autograd,
        "save_on_cpu": on_cpu,
        "diffusers DPMSolverMultistepScheduler": diffusers_sde,
        "k-diffusion sample_dpmpp_2m_sde, randn": partial(k_sde, tree=False),
        "k-diffusion sample_dpmpp_2m_sde, Brownian tree": partial(k_sde, tree=True),
        "gradsampler store, Philox": ours("store", gs.noise.Philox()),
        "gradsampler store, SignedRoll": ours("store", gs.noise.SignedRoll()),
        "gradsampler checkpoint, Philox": ours("checkpoint", gs.noise.Philox()),
        "gradsampler checkpoint, SignedRoll": ours("checkpoint", gs.noise.SignedRoll()),
    },
}
