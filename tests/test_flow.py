# SPDX-License-Identifier: Apache-2.0
"""Times to train at against their distribution, training pairs against the formula by hand."""

import math
from fractions import Fraction

import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck

import gradsampler as gs
from gradsampler import flow
from support.problems import normal

COUNT = 20_000
LEAST_P = 1e-3  # the seeds are fixed, so this is no coin to be tossed anew

WORKED = [  # m t / (1 + (m - 1) t) by hand
    (Fraction(1), Fraction(1, 3), Fraction(1, 3)),
    (Fraction(3), Fraction(1, 2), Fraction(3, 4)),
    (Fraction(3), Fraction(1, 5), Fraction(3, 7)),
    (Fraction(5, 2), Fraction(2, 3), Fraction(5, 6)),
    (Fraction(1, 2), Fraction(1, 2), Fraction(1, 3)),
]


# The shift.


@pytest.mark.parametrize(("shift", "t", "shifted"), WORKED, ids=str)
def test_shift_by_hand(shift, t, shifted):
    got = flow.shift_times(torch.tensor([float(t)], dtype=torch.float64), float(shift))
    assert got.item() == pytest.approx(float(shifted), rel=1e-15)


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, math.sqrt(5), 3 * math.sqrt(33), 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_shift_leaves_the_ends_to_the_bit(shift, dtype):
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    got = flow.shift_times(ends, shift)
    assert got.dtype == dtype
    assert got.tolist() == [0.0, 1.0]


def test_shift_takes_a_tensor_for_each_time():
    t, m = torch.tensor([0.5, 0.2]).double(), torch.tensor([3.0, 3.0]).double()
    assert flow.shift_times(t, m).tolist() == pytest.approx([3 / 4, 3 / 7])
    assert gradcheck(flow.shift_times, (t.requires_grad_(), m.requires_grad_()))


# The times.


@pytest.mark.parametrize("shift", [1.0, math.sqrt(5), 3.0])
@pytest.mark.parametrize("seed", [None, 3])
def test_logits_are_normal_about_the_logarithm_of_the_shift(shift, seed):
    torch.manual_seed(7)
    t = flow.logit_normal(COUNT, shift, seed=seed, dtype=torch.float64)
    assert t.shape == (COUNT,)
    assert bool(((t > 0) & (t < 1)).all())
    logits = torch.log(t / (1 - t)).numpy()
    assert stats.kstest(logits, stats.norm(loc=math.log(shift)).cdf).pvalue > LEAST_P


def test_times_are_those_of_the_default_generator():
    torch.manual_seed(11)
    t = flow.logit_normal(5, 2.0)
    torch.manual_seed(11)
    drawn = [1 / (1 + math.exp(-n)) for n in torch.randn(5).tolist()]
    assert t.dtype == torch.float32
    assert t.tolist() == pytest.approx([2 * u / (1 + u) for u in drawn], rel=1e-6)


@pytest.mark.parametrize("seed", [None, 0])
def test_narrow_times_are_wide_ones_rounded(seed):
    torch.manual_seed(1)
    wide = flow.logit_normal(64, 2.0, seed=seed)
    torch.manual_seed(1)
    narrow = flow.logit_normal(64, 2.0, seed=seed, dtype=torch.bfloat16)
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def test_a_seed_gives_the_same_times_again_and_others_other_ones():
    first, again, other = (flow.logit_normal(8, seed=k) for k in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_one_seed_for_times_and_noise_draws_different_numbers():
    t = flow.logit_normal(COUNT, seed=9, dtype=torch.float64)
    x1 = flow.training_pair(torch.zeros(COUNT, 1, dtype=torch.float64), t, seed=9).x1
    assert abs(stats.pearsonr(torch.log(t / (1 - t)).numpy(), x1[:, 0].numpy())[0]) < 0.03


# The pair.


@pytest.mark.parametrize("sigma_min", [1e-5, 0.0, 0.3])
def test_pair_by_hand(sigma_min):
    x0, x1 = normal(3, 2, 2, seed=1), normal(3, 2, 2, seed=2)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    pair = flow.training_pair(x0, t, x1, sigma_min=sigma_min)
    for b, time in enumerate(t.tolist()):
        r = 1 - time
        for j in range(4):
            data, noise = x0[b].view(-1)[j].item(), x1[b].view(-1)[j].item()
            between = r * data + (1 - (1 - sigma_min) * r) * noise
            assert pair.x_t[b].view(-1)[j].item() == pytest.approx(between, rel=1e-12)
            velocity = (1 - sigma_min) * noise - data
            assert pair.v[b].view(-1)[j].item() == pytest.approx(velocity, rel=1e-12)
    assert torch.equal(pair.x_t[2], x1[2])  # all noise at t = 1
    assert pair.t is t


def test_velocity_is_the_slope_of_the_path():
    # dx_t/dt = (1-sigma_min) x1 - x0, by an exact difference: the path is straight.
    x0, x1 = normal(4, 3, seed=1), normal(4, 3, seed=2)
    early, late = torch.full((4,), 0.25).double(), torch.full((4,), 0.75).double()
    a, b = (flow.training_pair(x0, t, x1, sigma_min=0.1) for t in (early, late))
    torch.testing.assert_close((b.x_t - a.x_t) / 0.5, a.v, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_pair():
    x0, x1 = normal(3, 4, seed=1).requires_grad_(), normal(3, 4, seed=2).requires_grad_()
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=True)

    def both(x0, t, x1):
        pair = flow.training_pair(x0, t, x1, sigma_min=0.2)
        return pair.x_t, pair.v

    assert gradcheck(both, (x0, t, x1))
    # And by hand: d<g, x_t>/dt = <g, (1-s) x1 - x0>, d/dx0 = (1-t) g, d/dx1 = (1-(1-s)(1-t)) g.
    g = normal(3, 4, seed=3)
    dx0, dt, dx1 = torch.autograd.grad(both(x0, t, x1)[0], (x0, t, x1), g)
    r = (1 - t.detach())[:, None]
    torch.testing.assert_close(dx0, r * g, rtol=1e-12, atol=0)
    torch.testing.assert_close(dx1, (1 - 0.8 * r) * g, rtol=1e-12, atol=0)
    torch.testing.assert_close(dt, (g * (0.8 * x1 - x0)).sum(1).detach(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_noise_is_drawn_in_float32_and_cast(dtype):
    x0, t = torch.zeros(4, 6, dtype=dtype), torch.ones(4, dtype=dtype)
    torch.manual_seed(5)
    pair = flow.training_pair(x0, t)
    torch.manual_seed(5)
    drawn = torch.randn(4, 6, dtype=torch.float32).to(dtype)
    assert pair.x1.dtype == pair.x_t.dtype == pair.v.dtype == dtype
    assert torch.equal(pair.x1, drawn)
    assert torch.equal(pair.x_t, drawn)


def test_seeded_noise_is_philox_at_step_zero():
    x0, t = torch.zeros(3, 5, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    pair = flow.training_pair(x0, t, seed=6)
    expected = gs.noise.Philox(seed=6).at(torch.zeros(3, 5), 0, 1).to(torch.bfloat16)
    assert torch.equal(pair.x1, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.shift_times(torch.ones(2), 0.0), "shift must be above 0, got 0.0"),
        (lambda: flow.shift_times(torch.ones(2, dtype=torch.int64), 2.0), "floating-point dtype"),
        (lambda: flow.logit_normal(0), "count must be at least 1, got 0"),
        (lambda: flow.logit_normal(2, seed=-1), "seed must be at least 0, got -1"),
        (lambda: flow.logit_normal(2, dtype=torch.int32), "dtype must be a floating-point dtype"),
        (lambda: flow.training_pair(torch.ones(2), torch.ones(2)), r"x0 must have shape \[B, \*st"),
        (lambda: flow.training_pair(torch.ones(2, 3), torch.ones(3)), r"t must have shape \[2\]"),
        (
            lambda: flow.training_pair(torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), seed=1),
            "x1 must be given, or else seed, got both",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
