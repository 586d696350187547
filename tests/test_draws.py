# SPDX-License-Identifier: Apache-2.0
"""Steps that draw several noises: each is one of its own, in every source, strategy and backend."""

import math
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from scipy import stats

import gradsampler as gs
from gradsampler.noise import philox, sources
from gradsampler.ops import backends
from support.noises import SOURCES
from support.problems import normal

LEVELS = (3.0, 1.7, 0.8, 0.3)
N = len(LEVELS) - 1
NOISES = {name: source for name, source in SOURCES.items() if name != "off"}
BACKENDS = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(not backends.present(name), reason=f"{name} is not here"),
            *([pytest.mark.thorough] if name == "triton" else []),
        ],
    )
    for name in ("reference", "cpu", "triton")
]


class ThreeDraws(gs.solvers.Solver):
    """Noise before the model call, noise after it, and a third one that enters twice."""

    stochastic = True

    def step(self, run, x, s, t):
        x, denoised = run.denoise(x + 0.3 * s * run.noise(), s)
        third = run.noise()
        x = denoised + (t / s) * (x - denoised) + 0.2 * t * third
        x, denoised = run.denoise(x, (s + t) / 2)
        return x + 0.1 * (denoised - x) + 0.5 * t * run.noise() - 0.4 * t * third


def network(x, sigma):
    return torch.tanh(x) * 0.4 + 0.5 * x / (1 + sigma[:, None] ** 2)


def loop(z0, sigmas, noise):
    """`ThreeDraws` written out; ``noise(step, draw)``."""
    x = sigmas[0] * z0
    for i, (s, t) in enumerate(pairwise(sigmas)):
        x = x + 0.3 * s * noise(i, 0)
        denoised = network(x, s.expand(len(x)))
        x = denoised + (t / s) * (x - denoised) + 0.2 * t * noise(i, 1)
        denoised = network(x, ((s + t) / 2).expand(len(x)))
        x = x + 0.1 * (denoised - x) + 0.5 * t * noise(i, 2) - 0.4 * t * noise(i, 1)
    return x


def leaves():
    sigmas = torch.tensor(LEVELS, dtype=torch.float64, requires_grad=True)
    return normal(2, 5).requires_grad_(), sigmas


def assert_same_with_gradients(got, expected, inputs):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    lam = normal(*got.shape, seed=9)
    want = torch.autograd.grad(expected, inputs, lam, retain_graph=True)
    for a, b in zip(torch.autograd.grad(got, inputs, lam), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:2", "auto"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", NOISES)
def test_a_run_is_the_loop_with_a_noise_for_each_draw(kind, backend, memory):
    (z0, sigmas), source = leaves(), NOISES[kind]
    got = gs.sample(
        network, z0, sigmas, solver=ThreeDraws(), noise=source, memory=memory, backend=backend
    )
    expected = loop(z0, sigmas, lambda i, k: source.at(z0, i, N, k))
    assert_same_with_gradients(got, expected, (z0, sigmas))


@pytest.mark.parametrize("memory", ["store", "checkpoint", "truncated:3"])
def test_given_tensors_are_taken_in_the_order_of_injection(memory):
    z0, sigmas = leaves()
    given = [normal(2, 5, seed=20 + k).requires_grad_() for k in range(3 * N)]
    # The second draw enters before the third: order[i, k] is the place of draw k of step i.
    got = gs.sample(
        network, z0, sigmas, solver=ThreeDraws(), noise=gs.noise.Given(given), memory=memory
    )
    expected = loop(z0, sigmas, lambda i, k: given[3 * i + k])
    assert_same_with_gradients(got, expected, (z0, sigmas, *given))


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_last_steps_alone_have_the_noises_of_their_own(kind, steps):
    (z0, sigmas), source = leaves(), NOISES[kind]
    options = {"solver": ThreeDraws(), "noise": source}
    warned = pytest.warns(UserWarning, match="the gradient to z0 is zero")
    with nullcontext() if source.of_z0 else warned:
        got = gs.sample(network, z0, sigmas, memory=f"truncated:{steps}", **options)
    expected = loop(z0, sigmas, lambda i, k: source.at(z0, i, N, k))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["signed_roll", "philox", "mixture"])
def test_the_draws_of_a_step_are_normal_and_independent(kind):
    z0, source = normal(4, 2**16), NOISES[kind]
    draws = [source.at(z0, step, 9, k) for step in (0, 3) for k in range(4)]
    bound = 5 / math.sqrt(z0.numel())
    for i, x in enumerate(draws):
        assert stats.kstest(x.flatten().numpy(), "norm").pvalue > 1e-4
        for y in draws[:i]:
            assert abs(float((x * y).mean())) < bound
            assert abs(float((x**2 * y**2).mean()) - 1) < 12 * bound


def test_two_draws_add_up_in_quadrature():
    class Twice(gs.solvers.Solver):
        stochastic = True

        def step(self, run, x, s, t):
            return run.noise() + run.noise()

    x = gs.sample(lambda x, sigma: x, normal(4, 2**14), [2.0, 1.0], solver=Twice())
    assert x.square().mean().item() == pytest.approx(2.0, rel=0.02)


def test_no_two_draws_share_a_counter_word():
    words = {philox.counter(step, draw) for step in range(300) for draw in range(40)}
    assert len(words) == 300 * 40
    assert all(philox.counter(step, 0) == step for step in (0, 7, 2**20, 2**31))
    assert philox.counter(2**20 - 1, 4095) == 2**32 - 1  # the last one that a word holds


@pytest.mark.parametrize(("step", "draw"), [(2**20, 1), (0, 4096), (3, -1)])
def test_a_draw_that_no_word_names_is_refused(step, draw):
    with pytest.raises(ValueError, match="number of a draw must be below 4096 in a step below"):
        gs.noise.Philox().at(normal(2, 3), step, step + 1, draw)


@pytest.mark.parametrize("draw", [1, 2, 7])
def test_sincos_moves_its_phase_by_the_golden_angle(draw):
    z0, i, n = normal(2, 5), 4, 9
    turned = math.pi * (3 - math.sqrt(5)) * draw
    wave = 0.1 * torch.sin(0.4 * z0 + i + turned) + 0.05 * torch.cos(0.4 * z0 + turned)
    expected = z0 * (1 + 0.1 * i / n) + wave
    torch.testing.assert_close(gs.noise.SinCos().at(z0, i, n, draw), expected)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("draw", [0, 1, 5])
def test_transpose_and_numbers_are_those_of_at(kind, draw):
    source, z0, g = NOISES[kind], normal(3, 7).requires_grad_(), normal(3, 7, seed=1)
    noise = source.at(z0, 2, 9, draw)
    pulled = source.transpose(g, z0.detach(), 2, 9, draw).z0
    if noise.requires_grad:
        (expected,) = torch.autograd.grad(noise, z0, g)
        torch.testing.assert_close(pulled, expected, rtol=1e-13, atol=1e-13)
    else:
        assert pulled is None
    ops = gs.ops.step([z0.detach()], [0.0], z0.detach(), source, 2, 9, 1.0, draw=draw)
    torch.testing.assert_close(ops, noise.detach(), rtol=1e-10, atol=1e-10)


class Squared(gs.noise.NoiseSource):
    """A source of one's own, written for one draw a step."""

    def at(self, z0, step, num_steps):
        return z0**2 + step


class Numbered(gs.noise.NoiseSource):
    """One that knows of draws."""

    def at(self, z0, step, num_steps, draw=0):
        return z0**2 + step + 10 * draw


def test_a_source_for_one_draw_serves_solvers_that_draw_once():
    (z0, sigmas), source = leaves(), Squared()
    x = gs.sample(network, z0, sigmas, solver="euler_ancestral", noise=source, memory="checkpoint")
    assert torch.autograd.grad(x.sum(), z0)[0].isfinite().all()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: gs.noise.Mixture(s, 0.4)])
def test_a_source_for_one_draw_is_refused_before_a_run_that_draws_more(wrap):
    calls = []
    z0, sigmas = leaves()
    expected = (
        r"noise=Squared: at must take draw=, as this run draws more than one noise at step 0, "
        r"got at\(z0, step, num_steps\); define at\(z0, step, num_steps, draw=0\)"
    )
    with pytest.raises(ValueError, match=expected):
        gs.sample(calls.append, z0, sigmas, solver=ThreeDraws(), noise=wrap(Squared()))
    assert not calls


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_a_source_of_ones_own_is_asked_for_each_draw(memory):
    z0, sigmas = leaves()
    got = gs.sample(network, z0, sigmas, solver=ThreeDraws(), noise=Numbered(), memory=memory)
    expected = loop(z0, sigmas, lambda i, k: z0**2 + i + 10 * k)
    assert_same_with_gradients(got, expected, (z0, sigmas))


def test_given_says_which_draw_has_no_tensor():
    z0 = normal(2, 3)
    with pytest.raises(ValueError, match=r"Given: step must be one of \[0\], got draw 1 of step 0"):
        gs.noise.Given([z0]).at(z0, 0, 1, 1)


def test_the_golden_angle_never_comes_back():
    turns = [sources.GOLDEN_ANGLE * k / (2 * math.pi) % 1 for k in range(200)]
    gaps = [b - a for a, b in zip(sorted(turns), [*sorted(turns)[1:], 1.0], strict=True)]
    assert min(gaps) > 0.3 / 200


@pytest.mark.skipif(not backends.present("triton"), reason="triton is not here")
def test_the_kernels_draw_anew_as_well():
    (z0, sigmas), source = leaves(), NOISES["mixture"]
    options = {"solver": ThreeDraws(), "noise": source, "memory": "checkpoint"}
    got = gs.sample(network, z0, sigmas[:2], backend="triton", **options)
    expected = loop(z0, sigmas[:2], lambda i, k: source.at(z0, i, 1, k))
    assert_same_with_gradients(got, expected, (z0, sigmas))
