# SPDX-License-Identifier: Apache-2.0
"""Runs whose initial noise and network are in 16 bits, with the state in float32.

The oracle is float64; what can be reached is what a loop in plain torch reaches that keeps its
state in float32 and calls the network in 16 bits, as k-diffusion does with promoted states.
"""

from itertools import pairwise

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler.solvers import Adaptive
from support.euler import euler
from support.loops import LOOPS, Run
from support.problems import Gaussian, normal
from support.runs import leaf
from support.strategies import STRATEGIES, strategies
from support.tiers import pairs

SHAPE = (16, 12)
SIGMAS = gs.schedules.karras(12, sigma_min=0.05, sigma_max=9.0)
DTYPES = [torch.bfloat16, torch.float16]
Z0 = normal(*SHAPE).bfloat16().double()
# In eighths, so that a sample in 16 bits gets the same cotangent as any other.
WEIGHTS = (8 * normal(*SHAPE, seed=1)).round() / 8
NOISES = [normal(*SHAPE, seed=20 + k).bfloat16().double() for k in range(36)]
# Not those that choose their levels, which they choose otherwise where the network rounds.
CHOOSING = {name for name in gs.solvers.names() if isinstance(gs.solvers.resolve(name), Adaptive)}
NAMES = sorted((LOOPS.keys() & set(gs.solvers.names())) - CHOOSING)


def error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def gradients(run, *inputs):
    inputs = [leaf(x) for x in inputs]
    found = torch.autograd.grad((run(*inputs).double() * WEIGHTS).sum(), inputs)
    assert [g.dtype for g in found] == [x.dtype for x in inputs]
    return found


def looped(denoiser, solver, z0, dtype):
    """The loop of that name, the denoiser called in ``dtype``; and how many noises it drew."""

    def called(x, sigma):
        return denoiser(x.to(dtype), torch.tensor(sigma, dtype=torch.float64)).to(x.dtype)

    run = Run(called, iter(NOISES))
    x = LOOPS[solver](run, SIGMAS[0].item() * z0, SIGMAS.tolist())
    return x, run.drawn


def compared(denoiser, solver, memory, dtype):
    """The gradients of a run and of the loop in 16 bits, and that of the loop in float64."""
    _, count = looped(denoiser, solver, Z0, torch.float64)
    z0, noise = Z0.to(dtype), [n.to(dtype) for n in NOISES[:count]]
    options = {"solver": solver, "memory": memory, "noise": noises.Given(noise) if count else None}
    (exact,) = gradients(lambda z0: looped(denoiser, solver, z0, torch.float64)[0], Z0)
    (promoted,) = gradients(lambda z0: looped(denoiser, solver, z0.float(), dtype)[0], z0)
    (got,) = gradients(lambda z0: gs.sample(denoiser, z0, SIGMAS, **options), z0)
    return got, promoted, exact


@pairs(solver=NAMES, memory=STRATEGIES, dtype=DTYPES)
def test_the_gradient_is_that_of_a_state_in_float32(solver, memory, dtype, tmp_path):
    def denoiser(x, sigma):
        return torch.tanh(x)

    got, promoted, _ = compared(denoiser, solver, STRATEGIES[memory](tmp_path), dtype)
    # A sum that is rounded elsewhere in float32 may end in another number of 16 bits.
    assert error(got, promoted) <= 0.1 * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_how_far_it_is_from_float64(solver, memory):
    got, promoted, exact = compared(Gaussian().denoise, solver, memory, torch.bfloat16)
    assert error(got, exact) <= max(4e-3, 1.05 * error(promoted, exact))


@strategies
def test_the_gradient_of_conditioning_is_summed_in_float32(memory, tmp_path):
    # Sixty calls add up to it, of which each late one is small beside the sum.
    sigmas, shift = gs.schedules.karras(60, sigma_min=0.05, sigma_max=9.0), normal(12, seed=3)

    def denoiser(x, sigma, shift):
        return 0.5 * x + shift

    def loop(z0, shift, dtype=torch.float64):
        def called(x, sigma):
            return denoiser(x.to(dtype), sigma, shift.to(dtype)).to(x.dtype)

        return euler(called, z0, sigmas)

    def run(z0, shift):
        memories = STRATEGIES[memory](tmp_path)
        return gs.sample(denoiser, z0, sigmas, cond={"shift": shift}, memory=memories)

    half = Z0.bfloat16(), shift.bfloat16()
    for got, exact in zip(gradients(run, *half), gradients(loop, Z0, shift), strict=True):
        assert error(got, exact) <= 4e-3


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_the_sample_is_that_of_a_state_in_float32(memory):
    z0 = Z0.bfloat16()

    def denoiser(x, sigma):
        return torch.tanh(x)

    x = SIGMAS[0].item() * z0.float()
    for s, t in pairwise(SIGMAS.tolist()):
        x = x + (t - s) * (x - denoiser(x.bfloat16(), s).float()) / s
    got = gs.sample(denoiser, z0.requires_grad_(), SIGMAS, memory=memory)
    assert error(got.detach(), x.bfloat16()) <= 1e-4
