# SPDX-License-Identifier: Apache-2.0
"""Consistent Philox noise: the increments of one Brownian path, refined where steps are halved."""

import math

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from support.problems import Gaussian, normal

Z0 = torch.zeros(3, 5, dtype=torch.float64)
PATH = noises.Philox(seed=9, consistent=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 8, 35])
def test_two_halves_sum_to_the_whole(steps):
    for i in range(steps):
        halves = PATH.at(Z0, 2 * i, 2 * steps) + PATH.at(Z0, 2 * i + 1, 2 * steps)
        torch.testing.assert_close(halves / math.sqrt(2), PATH.at(Z0, i, steps))


def test_the_draws_of_a_step_are_its_parts():
    """Two in each of 3 steps are the increments over 6 intervals."""
    twice = PATH.prepare(Z0, [(0, 0), (0, 1), (1, 0), (1, 1)])
    for step in range(3):
        for draw in range(2):
            got = twice.at(Z0, step, 3, draw)
            assert torch.equal(got, PATH.at(Z0, 2 * step + draw, 6))


def test_an_odd_number_of_steps_has_the_normals_of_their_numbers():
    plain = noises.Philox(seed=9)
    assert torch.equal(PATH.at(Z0, 4, 7), plain.at(Z0, 4, 7))


@pytest.mark.parametrize("steps", [8, 12])
def test_noises_of_a_run_are_standard_and_independent(steps):
    wide = torch.zeros(1, 40000, dtype=torch.float64)
    drawn = torch.cat([PATH.at(wide, i, steps) for i in range(steps)])
    covariance = drawn @ drawn.T / drawn.shape[1]
    assert (covariance - torch.eye(steps, dtype=torch.float64)).abs().max() < 5 / math.sqrt(40000)


def runs(noise, counts, solver="dpmpp_2m_sde"):
    z0, model = normal(2, 200, seed=1), Gaussian(0.3, 0.5).denoise
    return [
        gs.sample(model, z0, gs.schedules.karras(n, 0.05, 20.0), solver=solver, noise=noise)
        for n in counts
    ]


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "seeds_2", "euler_ancestral"])
def test_samples_of_ever_more_steps_converge_one_by_one(solver):
    """Noise that is drawn anew for each number of steps only lets their distribution converge."""
    a, b, c = runs(noises.Philox(seed=3, consistent=True), (20, 40, 80), solver)
    assert (c - b).square().mean() < 0.45 * (b - a).square().mean()
    d, e, f = runs(noises.Philox(seed=3), (20, 40, 80), solver)
    assert (f - e).square().mean() > 0.7 * (e - d).square().mean()


@pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:2"])
def test_backward_draws_the_same_path(memory):
    z0 = normal(2, 5).requires_grad_()
    sigmas = gs.schedules.karras(6, 0.1, 5.0).requires_grad_()
    program = {"solver": "seeds_2", "noise": PATH}
    x = gs.sample(Gaussian().denoise, z0, sigmas, memory=memory, **program)
    got = torch.autograd.grad(x.sum(), (z0, sigmas))
    given = [PATH.prepare(z0, [(0, 1)]).at(z0.detach(), i, 6, k) for i in range(6) for k in (0, 1)]
    y = gs.sample(
        Gaussian().denoise, z0, sigmas, solver="seeds_2", noise=noises.Given(given), memory="store"
    )
    expected = torch.autograd.grad(y.sum(), (z0, sigmas))
    torch.testing.assert_close(x, y)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_backend_runs_it(backend):
    if not gs.backends.present(backend):
        pytest.skip(f"no {backend} here")
    z0 = normal(2, 7, dtype=torch.float32)
    options = {"solver": "dpmpp_2m_sde", "noise": PATH}
    sigmas = gs.schedules.karras(4, 0.1, 5.0)
    x = gs.sample(Gaussian().denoise, z0, sigmas, backend=backend, **options)
    wide = gs.sample(Gaussian().denoise, z0.double(), sigmas, backend="reference", **options)
    torch.testing.assert_close(x.double(), wide, rtol=1e-5, atol=1e-5)


def test_a_draw_beyond_those_of_a_step_is_refused():
    with pytest.raises(
        ValueError, match="Philox: draw must be below 1, a step's number of draws, got 1"
    ):
        PATH.at(Z0, 0, 4, 1)


def test_an_adaptive_run_refuses_it():
    with pytest.raises(ValueError, match="noise must not depend on the number of steps"):
        gs.sample(
            Gaussian().denoise,
            normal(2, 5),
            [5.0, 0.1],
            solver=gs.solvers.DPMAdaptive(eta=0.5),
            noise=PATH,
        )
