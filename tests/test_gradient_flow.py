# SPDX-License-Identifier: Apache-2.0
"""The gradient-flow check: its numbers against a loop by hand, and each broken link by name."""

import math
import re

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler import gradient_flow
from support.problems import normal

SHAPE = (1, 2, 2, 8, 8)
MODES = {"off": gs.noise.Off(), "sincos": gs.noise.SinCos()}
modes = pytest.mark.parametrize("noise", MODES.values(), ids=MODES)
NUMBER = r"(-?[\d.]+(?:e[+-]?\d+)?)"


def check(denoiser, z0, noise, *, steps=4, solver="res_2ab", **options):
    """The check as the command line has it: churn of a fifth, for which any noise is injected."""
    return gs.check(
        denoiser,
        z0,
        gs.schedules.karras(steps),
        solver=solver,
        noise=noise,
        churn=gs.Churn(0.2 * steps),
        memory="checkpoint",
        **options,
    )


def start(*shape):
    return normal(*(shape or SHAPE)).requires_grad_()


def karras(n):
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    return [(high + i / n * (low - high)) ** 7 for i in range(n + 1)]


def affine(x, s):
    return 0.7 * x + 0.1


def sincos(z0, i, n):
    """The learnable step noise, to the letter."""
    return (
        z0 * (1 + 0.1 * i / n) + 0.1 * torch.sin(z0 * 0.1 * i + i) + 0.05 * torch.cos(z0 * 0.1 * i)
    )


def res_2ab(z0, n, *, inject):
    """RES (arXiv 2308.02157) with the previous step's D as second point, after EDM's churn."""
    levels = karras(n)
    x, previous = levels[0] * z0, None
    for i in range(n):
        s, t = levels[i] * 1.2, levels[i + 1]
        if inject:
            x = x + math.sqrt(s**2 - levels[i] ** 2) * sincos(z0, i, n)
        denoised = affine(x, s)
        h = math.log(s / t)
        phi1 = (1 - math.exp(-h)) / h
        if previous is None:
            x = (t / s) * x + h * phi1 * denoised
        else:
            level, at_m = previous
            phi2 = (1 - phi1) / h
            b2 = phi2 * h / math.log(s / level)
            x = (t / s) * x + h * ((phi1 - b2) * denoised + b2 * at_m)
        previous = s, denoised
    return x


def loss_of(z0, n, inject):
    return ((res_2ab(z0, n, inject=inject) - 1) ** 2).mean()


@pytest.mark.parametrize("steps", [1, 4, 9])
@modes
def test_numbers_are_those_of_a_loop_by_hand(noise, steps):
    z0, inject = start(), noise == MODES["sincos"]
    report = check(affine, z0, noise, steps=steps)
    loss = loss_of(z0, steps, inject)
    (gradient,) = torch.autograd.grad(loss, z0)
    first = gradient / (gradient.abs() + 1e-8)  # Adam's first step for lr = 1
    assert report.passed
    lines = report.lines
    assert len(lines) == 6
    assert lines[0] == f"forward: sample of shape {list(SHAPE)}, requires_grad=True"
    assert lines[1].startswith(f"anchor z0: shape {list(SHAPE)}, requires_grad=True")
    (found,) = re.findall(rf"loss {NUMBER}", lines[2])
    assert float(found) == pytest.approx(loss.item(), rel=1e-5)
    found = re.findall(rf"mean {NUMBER}, max {NUMBER}, min {NUMBER}", lines[3])
    expected = [gradient.mean().item(), gradient.max().item(), gradient.min().item()]
    assert [*map(float, *found)] == pytest.approx(expected, rel=1e-5)
    (found,) = re.findall(rf"mean absolute difference {NUMBER}", lines[4])
    assert float(found) == pytest.approx(0.1 * first.abs().mean().item(), rel=1e-5)


@modes
def test_the_loop_by_hand_has_the_gradient_of_central_differences(noise):
    z0, inject = start(1, 5), noise == MODES["sincos"]
    (gradient,) = torch.autograd.grad(loss_of(z0, 4, inject), z0)
    for j in range(5):
        step = torch.zeros_like(z0)
        step[0, j] = 1e-5
        with torch.no_grad():
            rise = loss_of(z0 + step, 4, inject) - loss_of(z0 - step, 4, inject)
        assert gradient[0, j].item() == pytest.approx(rise.item() / 2e-5, rel=1e-6)


@modes
def test_prints_six_numbered_lines_and_a_verdict(noise):
    text = str(check(gradient_flow.affine_denoiser, start(), noise)).splitlines()
    heads = [line.split(":")[0].strip() for line in text]
    assert heads == [
        "1. forward",
        "2. anchor z0",
        "3. loss and backward",
        "4. gradient",
        "5. optimiser update",
        "6. differences",
        "the gradient arrives",
    ]


@modes
def test_leaves_z0_alone(noise):
    z0 = start()
    before = z0.detach().clone()
    check(affine, z0, noise)
    assert torch.equal(z0, before)
    assert z0.grad is None


def test_ascends():
    z0 = start()
    report = check(affine, z0, gs.noise.SinCos(), lr=0.25)
    assert "difference 0.25" in report.lines[4]


# ------------------------------------------------------------------ noise that is fine


class Reparameterised(gs.noise.NoiseSource):
    """Drawn about z0: N(0, 1) as a function of z0 and of a fixed normal."""

    def at(self, z0, step, num_steps):
        torch.manual_seed(step)
        return torch.distributions.Normal(0.6 * z0, 0.8).rsample()


@pytest.mark.parametrize(
    "noise",
    [
        gs.noise.SignedRoll(seed=1),
        gs.noise.Philox(seed=1),
        gs.noise.Mixture(gs.noise.SignedRoll(), 0.5),
        gs.noise.Given([normal(*SHAPE, seed=k) for k in range(4)]),
        gs.noise.Mixture(gs.noise.Given([normal(*SHAPE, seed=k) for k in range(4)]), 0.5),
        gs.noise.Mixture(gs.noise.Off(), 0.5),
        Reparameterised(),
    ],
    ids=[
        "signed_roll",
        "philox",
        "mixture",
        "given",
        "mixture of given",
        "mixture of off",
        "rsample",
    ],
)
def test_finds_nothing_wrong_with(noise):
    report = check(affine, start(), noise)
    assert report.passed, report.broken


# ------------------------------------------------------------------ broken links


@modes
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
def test_names_a_lack_of_grad_mode(noise, mode):
    z0 = start()
    with mode():
        report = check(affine, z0, noise)
    assert not report.passed
    assert report.broken[0].startswith("no grad mode")
    assert len(report.broken) == 1
    assert "requires_grad=False" in report.lines[0]
    assert "requires_grad=True" in report.lines[1]
    assert "broken: no grad mode" in str(report)
    assert "arrives" not in str(report)


@modes
def test_names_z0_without_requires_grad(noise):
    report = check(affine, start().detach(), noise)
    assert not report.passed
    assert report.broken[0].startswith("z0 without requires_grad")
    assert len(report.broken) == 1
    assert "requires_grad=False" in report.lines[1]
    assert len(report.lines) == 3


def test_names_both_of_two():
    with torch.no_grad():
        report = check(affine, start().detach(), gs.noise.SinCos())
    assert [link.split(",")[0] for link in report.broken] == [
        "no grad mode",
        "z0 without requires_grad",
    ]


@torch.no_grad()
def blind(x, sigma):
    return affine(x, sigma)


def detaching(x, sigma):
    return affine(x.detach(), sigma)


class Trained(nn.Module):
    """Detached from its input, yet with a gradient, which goes to its own parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, sigma):
        return self.scale * x.detach()


@modes
@pytest.mark.parametrize(
    "denoiser", [blind, detaching, Trained()], ids=["no_grad", "detach", "detach with parameters"]
)
def test_names_a_denoiser_that_detaches(noise, denoiser):
    report = check(denoiser, start(), noise)
    assert not report.passed
    assert report.broken == ["a denoiser that detaches, at step 0 of 4"]
    assert "arrives" not in str(report)


@modes
@pytest.mark.parametrize("step", [1, 2, 3])
def test_names_the_step_at_which_a_denoiser_detaches(noise, step):
    level = 1.2 * karras(4)[step]

    def denoiser(x, sigma):
        return affine(x.detach() if math.isclose(sigma[0].item(), level, rel_tol=1e-6) else x, 0)

    report = check(denoiser, start(), noise)
    assert report.broken == [f"a denoiser that detaches, at step {step} of 4"]


def test_a_detaching_denoiser_is_no_warning():
    """Under the suite's filter a warning that leaves the check would be an error."""
    assert not check(detaching, start(), gs.noise.Off()).passed


class Drawn(gs.noise.NoiseSource):
    """Noise of the right mean and width, drawn in the way that cannot be differentiated."""

    def at(self, z0, step, num_steps):
        torch.manual_seed(step)
        return torch.distributions.Normal(0.6 * z0, 0.8).sample()


class DrawnLater(Drawn):
    """Its first noise is reparameterised, its others are not."""

    def at(self, z0, step, num_steps):
        return super().at(z0, step, num_steps) if step else 0.6 * z0


@pytest.mark.parametrize("source", [Drawn(), DrawnLater()], ids=["always", "after the first step"])
def test_names_noise_drawn_without_reparameterisation(source):
    report = check(affine, start(), source)
    assert not report.passed
    (link,) = report.broken
    assert link.startswith(f"noise drawn without reparameterisation, {type(source).__name__}.at")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"solver": "res2ab"}, "solver must be one of .*did you mean 'res_2ab'"),
        ({"z0": torch.zeros(3)}, "z0 must have shape"),
        ({"z0": [1.0]}, "z0 must be a torch.Tensor"),
        ({"denoiser": 0.7}, "denoiser must be callable"),
        ({"noise": "off"}, "noise must be a gradsampler.noise object"),
        ({"denoiser": lambda x, sigma: x[..., :1]}, "denoiser"),
    ],
    ids=["steps", "solver", "z0 shape", "z0 type", "denoiser", "noise", "denoiser's shape"],
)
def test_names_the_argument_that_does_not_fit(options, message):
    arguments = {"denoiser": affine, "z0": start(), "noise": gs.noise.Off()} | options
    with pytest.raises((ValueError, TypeError), match=message):
        check(**arguments)
