# SPDX-License-Identifier: Apache-2.0
"""Noise that other samplers and generators draw, once a run, and again where a run asks again."""

import re

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from support.problems import Mixture, normal
from support.strategies import replaying

MIXTURE = Mixture(6)
Z0 = normal(2, 2, 3, seed=1)
WEIGHTS = normal(2, 2, 3, seed=5)
LEVELS = (4.0, 1.5, 0.6, 0.2, 0.0)
INDEPENDENT = gs.solvers.DPMppSDE(independent=True)  # two noises a step, each injected once


def leaves():
    return Z0.clone().requires_grad_(), torch.tensor(LEVELS, dtype=torch.float64).requires_grad_()


def gradients(noise, memory="store", solver="dpmpp_sde"):
    """A run's sample, and the gradients to z0 and to all levels but the last."""
    z0, sigmas = leaves()
    x = gs.sample(MIXTURE.denoise, z0, sigmas, solver=solver, noise=noise, memory=memory)
    dz0, dsigmas = torch.autograd.grad((x * WEIGHTS).sum(), [z0, sigmas])
    return x.detach(), dz0, dsigmas[:-1]


def from_default(z0, step, number):
    return torch.randn_like(z0)


def taken(count, draw, seed=3):
    """The first noises of a generator, as tensors."""
    torch.manual_seed(seed)
    return [draw(Z0, k, 0) for k in range(count)]


@replaying
def test_a_run_has_the_gradients_of_given_noises(memory, tmp_path):
    """Drawn from torch's default generator, and drawn again in backward; three steps of two."""
    strategy = gs.memory.typical(tmp_path)[memory] if memory != "truncated" else memory
    strategy = gs.memory.Truncated(99, "revolve:2") if memory == "truncated" else strategy
    expected = gradients(noises.Given(taken(6, from_default)))
    torch.manual_seed(3)
    got = gradients(noises.Replayed(from_default), strategy)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_the_generators_are_left_where_a_loop_would_leave_them():
    taken(6, from_default)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    gradients(noises.Replayed(from_default), "revolve:2")
    assert torch.equal(torch.get_rng_state(), after)


def test_a_generator_that_is_named_is_set_back():
    generator = torch.Generator().manual_seed(7)

    def draw(z0, step, number):
        return torch.randn(z0.shape, dtype=z0.dtype, generator=generator)

    expected = gradients(noises.Given([draw(Z0, 0, 0) for _ in range(6)]))
    after = generator.get_state()
    generator.manual_seed(7)
    got = gradients(noises.Replayed(draw, generators=[generator]), "checkpoint")
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    assert torch.equal(generator.get_state(), after)


def test_what_cannot_be_drawn_again_is_an_error_unless_it_is_kept():
    """A list that is read once. Only the gradient to the levels needs a noise twice."""
    tensors = taken(6, from_default)

    def source(**options):
        supply = iter([*tensors, *tensors])
        return noises.Replayed(lambda z0, step, number: next(supply), **options)

    with pytest.raises(gs.ReplayError, match=r"got another noise at step 2.*keep=True"):
        gradients(source(), "checkpoint", INDEPENDENT)
    got = gradients(source(keep=True), "checkpoint", INDEPENDENT)
    expected = gradients(noises.Given(tensors), "store", INDEPENDENT)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    z0 = Z0.clone().requires_grad_()
    x = gs.sample(MIXTURE.denoise, z0, LEVELS, solver=INDEPENDENT, noise=source())
    assert torch.autograd.grad(x.sum(), z0)[0].norm() > 0


def test_every_run_draws_anew():
    """One object for several runs, as a noise sampler of a loop; each run is of a piece."""
    source = noises.Replayed(from_default)
    torch.manual_seed(3)
    first, second = (gradients(source, "checkpoint")[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, gradients(source, "checkpoint")[0])


def test_it_is_called_once_a_noise_in_the_order_of_the_run():
    called = []

    def denoise(x, sigma):
        called.append("model")
        return MIXTURE.denoise(x, sigma)

    def draw(z0, step, number):
        called.append((step, number))
        return torch.zeros_like(z0)

    with torch.no_grad():
        gs.sample(denoise, Z0, LEVELS[:3], solver=INDEPENDENT, noise=noises.Replayed(draw))
    assert called == ["model", (0, 0), "model", (0, 1), "model", (1, 0), "model", (1, 1)]


def test_the_noise_may_have_another_dtype():
    torch.manual_seed(3)
    half = noises.Replayed(lambda z0, step, number: torch.randn(z0.shape, dtype=torch.bfloat16))
    x = gs.sample(MIXTURE.denoise, Z0, LEVELS, solver="euler_ancestral", noise=half)
    torch.manual_seed(3)
    given = [torch.randn(Z0.shape, dtype=torch.bfloat16).double() for _ in range(3)]
    expected = gs.sample(
        MIXTURE.denoise, Z0, LEVELS, solver="euler_ancestral", noise=noises.Given(given)
    )
    assert torch.equal(x, expected)


def test_noise_that_carries_a_gradient_is_refused():
    learned = [x.requires_grad_() for x in taken(6, from_default)]
    source = noises.Replayed(lambda z0, step, number: 2 * learned[step])
    with pytest.raises(ValueError, match=r"draw returns at step 0 must not require grad.*Given"):
        gradients(source, "checkpoint")
    with torch.no_grad():
        gs.sample(MIXTURE.denoise, Z0, LEVELS, solver="euler_ancestral", noise=source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: noises.Replayed(3), "Replayed: draw must be callable as draw(z0, step, number)"),
        (
            lambda: noises.Replayed(from_default, generators=[3]),
            "Replayed: generators must be torch.Generators, got int",
        ),
        (
            lambda: gradients(noises.Replayed(lambda z0, i, k: z0[:1])),
            "noise=Replayed: what draw returns at step 0 must have shape [2, 2, 3]",
        ),
        (
            lambda: gradients(noises.Replayed(lambda z0, i, k: 1.0)),
            "noise=Replayed: what draw returns at step 0 must be a torch.Tensor",
        ),
        (
            lambda: noises.Replayed(from_default).identity(),
            "noise must be the same in another process for a checkpoint, got Replayed(from_def",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make()
