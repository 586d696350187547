# SPDX-License-Identifier: Apache-2.0
"""Schedules against hand-worked tables, 50-digit decimals and published numbers."""

import doctest
import math
import re
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradsampler import schedules

REL = 1e-13  # rounding of a few float64 operations, amplified by a power of at most ten
deterministic = settings(derandomize=True, deadline=None, max_examples=60)
finals = pytest.mark.parametrize("final", ["sigma_min", "zero"])


@pytest.fixture(autouse=True)
def fifty_digits():
    with localcontext() as context:
        context.prec = 50
        yield


def ramp(steps, final):
    """i/N as the two forms define it, exactly."""
    last = steps if final == "sigma_min" else steps - 1
    return [Decimal(i) / Decimal(last) for i in range(last + 1)]


def expect(got, positive_levels, final):
    zero = [0.0] if final == "zero" else []
    assert got.tolist() == pytest.approx([float(s) for s in positive_levels] + zero, rel=REL, abs=0)


def karras_oracle(steps, sigma_min, sigma_max, rho, final):
    low, high = (Decimal(s) ** (1 / Decimal(rho)) for s in (sigma_min, sigma_max))
    return [(high + r * (low - high)) ** Decimal(rho) for r in ramp(steps, final)]


def polyexponential_oracle(steps, sigma_min, sigma_max, rho, final):
    low, high = Decimal(sigma_min).ln(), Decimal(sigma_max).ln()
    return [((1 - r) ** Decimal(rho) * (high - low) + low).exp() for r in ramp(steps, final)]


def vp_oracle(steps, beta_d, beta_min, eps_s, final):
    times = [1 + r * (Decimal(eps_s) - 1) for r in ramp(steps, final)]
    rate, floor = Decimal(beta_d), Decimal(beta_min)
    return [((rate * t * t / 2 + floor * t).exp() - 1).sqrt() for t in times]


@pytest.mark.parametrize(
    ("args", "final", "table"),
    [
        pytest.param((2, 1, 9, 2), "sigma_min", [9, 4, 1], id="roots-3-2-1"),
        pytest.param((4, 1, 9, 2), "sigma_min", [9, 6.25, 4, 2.25, 1], id="roots-by-half"),
        pytest.param((2, 1, 64, 3), "sigma_min", [64, 15.625, 1], id="cube-of-2.5"),
        pytest.param((3, 1, 9, 2), "zero", [9, 4, 1, 0], id="zero-appended"),
        pytest.param((4, 1, 5, 1), "sigma_min", [5, 4, 3, 2, 1], id="rho-1-is-linear"),
        pytest.param((1, 1, 9, 2), "sigma_min", [9, 1], id="one-step"),
        pytest.param((1, 1, 9, 2), "zero", [9, 0], id="one-step-to-zero"),
        pytest.param((2, 1, 9, 2), "zero", [9, 1, 0], id="two-steps-to-zero"),
    ],
)
def test_karras_is_the_hand_worked_table(args, final, table):
    assert schedules.karras(*args, final=final).tolist() == pytest.approx(table, rel=REL, abs=0)


def test_karras_defaults_are_the_18_levels_of_edm():
    # fmt: off
    published = [80.0, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923, 1.088,
                 0.585, 0.296, 0.140, 0.060, 0.023, 0.008, 0.002, 0.0]
    # fmt: on
    got = schedules.karras(18, final="zero")
    assert got.tolist() == pytest.approx(published, abs=1e-3)
    assert got.tolist()[:-1] == schedules.karras(17).tolist()


@finals
@pytest.mark.parametrize("steps", [2, 3, 35])
@pytest.mark.parametrize(
    ("sigma_min", "sigma_max", "rho"), [(0.002, 80.0, 7.0), (0.01, 200.0, 5.5), (0.3, 0.4, 0.5)]
)
def test_karras_agrees_with_fifty_digits(steps, sigma_min, sigma_max, rho, final):
    got = schedules.karras(steps, sigma_min, sigma_max, rho, final)
    expect(got, karras_oracle(steps, sigma_min, sigma_max, rho, final), final)


def test_exponential_is_a_geometric_series():
    got = schedules.exponential(4, 0.01, 100.0)
    assert got.tolist() == pytest.approx([100, 10, 1, 0.1, 0.01], rel=REL)
    got = schedules.exponential(5, 0.01, 100.0, final="zero")
    assert got.tolist() == pytest.approx([100, 10, 1, 0.1, 0.01, 0], rel=REL)


def test_polyexponential_is_the_hand_worked_table():
    # Squares of 1, 1/2, 0 times four decades.
    got = schedules.polyexponential(2, 1.0, 1e4, rho=2.0)
    assert got.tolist() == pytest.approx([1e4, 10, 1], rel=REL)


@finals
@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("rho", [0.5, 1.0, 3.0])
def test_log_spaced_levels_agree_with_fifty_digits(steps, rho, final):
    oracle = polyexponential_oracle(steps, 0.0292, 14.6146, rho, final)
    expect(schedules.polyexponential(steps, 0.0292, 14.6146, rho, final), oracle, final)
    if rho == 1:
        expect(schedules.exponential(steps, 0.0292, 14.6146, final), oracle, final)


@pytest.mark.parametrize(
    ("beta_d", "beta_min", "table"),
    [
        pytest.param(0, 2 * math.log(2), [math.sqrt(3), 1], id="constant-rate"),
        pytest.param(4 * math.log(2), 0, [math.sqrt(3), math.sqrt(math.sqrt(2) - 1)], id="ramp"),
    ],
)
def test_vp_is_the_hand_worked_table(beta_d, beta_min, table):
    got = schedules.vp(1, beta_d, beta_min, eps_s=0.5)
    assert got.tolist() == pytest.approx(table, rel=REL)


@finals
@pytest.mark.parametrize("steps", [2, 25])
@pytest.mark.parametrize(
    ("beta_d", "beta_min", "eps_s"), [(19.9, 0.1, 1e-3), (5.0, 1.0, 1e-9), (0.5, 0.0, 0.1)]
)
def test_vp_agrees_with_fifty_digits(steps, beta_d, beta_min, eps_s, final):
    got = schedules.vp(steps, beta_d, beta_min, eps_s, final)
    expect(got, vp_oracle(steps, beta_d, beta_min, eps_s, final), final)


@finals
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential", "vp"])
def test_every_form_has_one_more_level_than_steps_in_float64(name, steps, final):
    bounds = () if name == "vp" else (0.002, 80.0)
    sigma = getattr(schedules, name)(steps, *bounds, final=final)
    assert sigma.shape == (steps + 1,)
    assert sigma.dtype == torch.float64
    assert (sigma.diff() < 0).all()
    assert (sigma[-1] == 0) == (final == "zero")


@deterministic
@given(
    steps=st.integers(1, 300),
    low=st.floats(1e-5, 10.0),
    ratio=st.floats(1.01, 1e6),
    rho=st.floats(0.5, 10.0),
    final=st.sampled_from(["sigma_min", "zero"]),
)
def test_bounds_are_kept_to_the_bit_and_levels_strictly_decrease(steps, low, ratio, rho, final):
    high = low * ratio
    for sigma in (
        schedules.karras(steps, low, high, rho, final),
        schedules.exponential(steps, low, high, final),
        # A larger power of 1/300 leaves too little of log 1.01 to tell levels apart.
        schedules.polyexponential(steps, low, high, min(rho, 2.0), final),
    ):
        positive = sigma[sigma > 0]
        assert positive[0].item() == high
        assert (sigma.diff() < 0).all()
        if len(positive) > 1:
            assert positive[-1].item() == low


def test_flow_is_the_hand_worked_table():
    assert schedules.flow(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert schedules.flow(2, shift=3.0).tolist() == [1, 0.75, 0]
    # 3t/(1 + 2t) at t = 1, 3/4, 1/2, 1/4, 0.
    expected = [1, 9 / 10, 3 / 4, 1 / 2, 0]
    assert schedules.flow(4, shift=3.0).tolist() == pytest.approx(expected, rel=REL, abs=0)


@deterministic
@given(steps=st.integers(1, 300), shift=st.floats(1e-3, 1e3))
def test_flow_shift_is_inverted_by_its_reciprocal_and_mirrored(steps, shift):
    even = torch.tensor([1 - i / steps for i in range(steps + 1)], dtype=torch.float64)
    t = schedules.flow(steps, shift)
    assert t[0] == 1
    assert t[-1] == 0
    assert (t.diff() < 0).all()
    torch.testing.assert_close(t / (shift + (1 - shift) * t), even, rtol=1e-12, atol=1e-13)
    mirrored = 1 - schedules.flow(steps, 1 / shift).flip(0)
    torch.testing.assert_close(t, mirrored, rtol=1e-12, atol=1e-13)


def test_restart_is_the_hand_worked_table():
    levels = torch.tensor([25.0, 9.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    got = schedules.restart(levels, 1.1, 24.0, steps=4, times=2, rho=2)
    way = [25.0, 16.0, 9.0, 4.0, 1.0]
    assert got.tolist() == [25.0, 9.0, 4.0, 1.0, *way, *way, 0.0]


def test_restart_agrees_with_the_web_uis_list():
    """AUTOMATIC1111's default for 20 to 35 steps, as it puts pairs of levels together."""
    main = schedules.karras(11, 0.03, 14.6, final="zero")
    nearest = [int((main - end).abs().argmin()) for end in (0.1, 2.0)]
    segment = schedules.karras(9, main[nearest[0]].item(), main[nearest[1]].item())
    pairs = []
    for i in range(len(main) - 1):
        pairs.append((main[i].item(), main[i + 1].item()))
        if i + 1 == nearest[0]:
            pairs += zip(segment[:-1].tolist(), segment[1:].tolist(), strict=True)
    levels = schedules.restart(main, 0.1, 2.0, steps=9).tolist()
    falling = [(s, t) for s, t in pairwise(levels) if t < s]
    assert falling == pairs
    assert len(falling) == len(levels) - 2


def test_restart_passes_gradients_to_the_levels():
    levels = torch.tensor([9.0, 4.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: schedules.restart(x, 1.0, 9.0, 3), levels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t_min": 4.0, "t_max": 4.0}, "restart: t_max must be nearest to a level above t_min's"),
        ({"t_min": 0.1, "t_max": 9.0}, "both positive, got 0 and 9"),
        ({"t_min": 1.0, "t_max": 9.0, "steps": 0}, "restart: steps must be at least 1, got 0"),
        ({"t_min": -1.0, "t_max": 9.0}, "restart: t_min must be"),
    ],
)
def test_a_restart_that_leads_nowhere_is_refused(arguments, message):
    levels = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=re.escape(message)):
        schedules.restart(levels, **{"steps": 2, **arguments})


def test_linear_betas_are_evenly_spaced_and_scaled_to_the_number_of_steps():
    assert schedules.betas("linear", 1000)[[0, -1]].tolist() == [1e-4, 0.02]
    # scale 40: from 0.004 to 0.8 in 24 intervals.
    table = [float(Fraction(4, 1000) + Fraction(796, 1000) * Fraction(i, 24)) for i in range(25)]
    assert schedules.betas("linear", 25).tolist() == pytest.approx(table, rel=REL)
    for steps in (21, 100, 4000):
        assert schedules.betas("linear", steps).sum().item() == pytest.approx(10.05, rel=1e-12)


def test_scaled_linear_betas_are_linear_in_the_root():
    got = schedules.betas("scaled_linear", 3)
    middle = (0.00085 + 0.012 + 2 * math.sqrt(0.00085 * 0.012)) / 4
    assert got.tolist() == pytest.approx([0.00085, middle, 0.012], rel=REL)
    roots = schedules.betas("scaled_linear", 1000).sqrt().diff()
    assert (roots - roots[0]).abs().max() < 1e-15


def test_cosine_betas_multiply_to_the_squared_cosine():
    steps = 1000
    got = schedules.alphas_cumprod(schedules.betas("cosine", steps))
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps)]
    assert got[:-1].tolist() == pytest.approx([x / f[0] for x in f[1:]], rel=1e-10)


def test_cosine_betas_end_at_their_cap():
    got = schedules.betas("cosine", 50)
    assert got[-1] == 0.999
    assert (got[:-1] < 0.999).all()
    assert schedules.betas("cosine", 1).tolist() == [0.999]


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("steps", [21, 50, 1000])
def test_betas_are_float64_increasing_fractions(name, steps):
    got = schedules.betas(name, steps)
    assert got.shape == (steps,)
    assert got.dtype == torch.float64
    assert ((got > 0) & (got < 1)).all()
    assert (got.diff() > 0).all()


def test_alphas_cumprod_is_the_hand_worked_table():
    betas = torch.tensor([0.5, 0.75, 0.5], dtype=torch.float32)
    got = schedules.alphas_cumprod(betas)
    assert got.dtype == torch.float64
    assert got.tolist() == [0.5, 0.125, 0.0625]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        pytest.param("linear", 157.407, 0.0100005, id="ddpm"),
        pytest.param("scaled_linear", 14.6146, 0.0291672, id="stable-diffusion"),
    ],
)
def test_discrete_levels_of_known_models_are_the_published_ones(name, first, last):
    levels = schedules.discrete(schedules.alphas_cumprod(schedules.betas(name, 1000)))
    assert levels.shape == (1001,)
    assert levels[[0, -2]].tolist() == pytest.approx([first, last], rel=1e-5)


def test_discrete_is_the_hand_worked_table():
    # 1/(1 + sigma^2) at sigma = 1, 2, 3.
    alphas_cumprod = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
    expected = pytest.approx([3, 2, 1, 0], rel=REL, abs=0)
    assert schedules.discrete(alphas_cumprod).tolist() == expected
    levels = schedules.discrete(alphas_cumprod, final="sigma_min")
    assert levels.tolist() == pytest.approx([3, 2, 1], rel=REL)
    for timesteps in ([0, 2], [2, 0], (2, 0), range(0, 3, 2)):
        levels = schedules.discrete(alphas_cumprod, timesteps)
        assert levels.tolist() == pytest.approx([3, 1, 0], rel=REL, abs=0)


def test_discrete_passes_gradients_to_alphas_cumprod():
    alphas_cumprod = torch.tensor([0.5, 0.2], dtype=torch.float64, requires_grad=True)
    schedules.discrete(alphas_cumprod)[0].backward()
    # d sigma/d alpha_bar = -1/(2 alpha_bar^2 sigma), at alpha_bar = 0.2, sigma = 2.
    assert alphas_cumprod.grad.tolist() == pytest.approx([0, -6.25], rel=REL, abs=0)


# fmt: off
STRIDED = [
    pytest.param(300, [10, 15, 20],
        [*range(0, 100, 11),
         100, 107, 114, 121, 128, 135, 142, 149, 157, 164, 171, 178, 185, 192, 199,
         200, 205, 210, 216, 221, 226, 231, 236, 242, 247, 252, 257, 263, 268, 273, 278, 283, 289,
         294, 299], id="three-sections"),
    pytest.param(1000, "25",
        [0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749,
         791, 832, 874, 916, 957, 999], id="one-section"),
    pytest.param(1000, "ddim25", list(range(0, 1000, 40)), id="ddim25"),
    pytest.param(1000, "ddim334", list(range(0, 1000, 3)), id="ddim-ragged"),
    pytest.param(7, "ddim7", list(range(7)), id="ddim-all"),
    pytest.param(7, "7", list(range(7)), id="all"),
    pytest.param(11, "3, 1, 2", [0, 2, 3, 4, 8, 10], id="ragged-sections"),
    pytest.param(10, [2, 0, 1], [0, 3, 7], id="empty-section"),
    pytest.param(24, [15], [0, 2, 3, 5, 7, 8, 10, 11, 13, 15, 16, 18, 20, 21, 23],
                 id="tie-below"),
    pytest.param(26, [13], [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23, 25], id="tie-above"),
]
# fmt: on


@pytest.mark.parametrize(("steps", "counts", "kept"), STRIDED)
def test_respace_keeps_the_timesteps_of_guided_diffusion(steps, counts, kept):
    assert schedules.respace(steps, counts) == kept


@pytest.mark.parametrize("steps", [2, 12, 60, 97])
def test_respace_ddim_finds_every_integer_stride_and_no_other(steps):
    by_count = {}
    for stride in reversed(range(1, steps)):
        by_count[len(range(0, steps, stride))] = list(range(0, steps, stride))
    for count in range(1, steps + 2):
        if count in by_count:
            assert schedules.respace(steps, f"ddim{count}") == by_count[count]
        else:
            with pytest.raises(ValueError, match=f"got 'ddim{count}'"):
                schedules.respace(steps, f"ddim{count}")


@deterministic
@given(st.data(), st.integers(1, 6), st.integers(6, 400))
def test_respace_spreads_each_section_from_its_first_timestep_to_its_last(data, parts, steps):
    sizes = [len(range(k, steps, parts)) for k in range(parts)]
    counts = [data.draw(st.integers(1, size)) for size in sizes]
    kept = schedules.respace(steps, counts)
    assert schedules.respace(steps, ",".join(map(str, counts))) == kept
    for size, count in zip(sizes, counts, strict=True):
        start = steps - sum(sizes)
        section, kept, sizes = kept[:count], kept[count:], sizes[1:]
        stride = Fraction(size - 1, max(count - 1, 1))
        assert section == sorted(set(section))
        for i, t in enumerate(section):
            assert abs(t - start - i * stride) <= Fraction(1, 2)
    assert kept == []


def test_results_stay_on_the_cpu_in_float64_whatever_the_default_device():
    with torch.device("meta"):
        results = [
            schedules.karras(3),
            schedules.exponential(3, 0.1, 1.0),
            schedules.vp(3, final="zero"),
            schedules.flow(3),
            schedules.betas("linear", 100),
            schedules.betas("cosine", 3),
        ]
    for x in results:
        assert x.device.type == "cpu"
        assert x.dtype == torch.float64


def fractions(*values):
    return torch.tensor(values, dtype=torch.float64)


VALUE_ERRORS = {
    "karras-steps-0": (schedules.karras, (0,), "karras: steps must be at least 1, got 0"),
    "karras-sigma_min-0": (schedules.karras, (5, 0.0), "karras: sigma_min must be above 0, got 0"),
    "karras-sigma_min-nan": (
        schedules.karras,
        (5, math.nan),
        "karras: sigma_min must be a finite number, got nan",
    ),
    "karras-sigma_max-inf": (
        schedules.karras,
        (5, 0.1, math.inf),
        "karras: sigma_max must be a finite number, got inf",
    ),
    "karras-bounds-swapped": (
        schedules.karras,
        (5, 80.0, 0.002),
        "karras: sigma_max must be above sigma_min 80.0, got 0.002",
    ),
    "karras-bounds-equal": (
        schedules.karras,
        (5, 1, 1),
        "karras: sigma_max must be above sigma_min 1.0, got 1",
    ),
    "karras-rho": (schedules.karras, (5, 0.1, 1.0, -7), "karras: rho must be above 0, got -7"),
    "karras-final": (
        schedules.karras,
        (5, 0.1, 1.0, 7.0, "zeros"),
        "karras: final must be one of sigma_min, zero, got 'zeros'; did you mean 'zero'?",
    ),
    "karras-levels-coincide": (
        schedules.karras,
        (5, 1.0, math.nextafter(1.0, 2.0)),
        "karras: levels must be finite and decrease strictly in float64, got [",
    ),
    "karras-levels-overflow": (
        schedules.karras,
        (5, 1.0, 80.0, 1e-3),
        "karras: levels must be finite and decrease strictly in float64, got [",
    ),
    "exponential-steps": (
        schedules.exponential,
        (-1, 0.1, 1.0),
        "exponential: steps must be at least 1, got -1",
    ),
    "exponential-sigma_min": (
        schedules.exponential,
        (5, -0.1, 1.0),
        "exponential: sigma_min must be above 0, got -0.1",
    ),
    "exponential-sigma_max": (
        schedules.exponential,
        (5, 1.0, 0.5),
        "exponential: sigma_max must be above sigma_min 1.0, got 0.5",
    ),
    "polyexponential-rho": (
        schedules.polyexponential,
        (5, 0.1, 1.0, 0),
        "polyexponential: rho must be above 0, got 0",
    ),
    "polyexponential-final": (
        schedules.polyexponential,
        (5, 0.1, 1.0, 1.0, ""),
        "polyexponential: final must be one of sigma_min, zero, got ''",
    ),
    "vp-eps_s-0": (schedules.vp, (5, 19.9, 0.1, 0.0), "vp: eps_s must be above 0, got 0.0"),
    "vp-eps_s-1": (schedules.vp, (5, 19.9, 0.1, 1), "vp: eps_s must be below 1, got 1"),
    "vp-beta_d": (
        schedules.vp,
        (5, -1.0),
        "vp: beta_d must be a finite number of at least 0.0, got -1.0",
    ),
    "vp-beta_min": (
        schedules.vp,
        (5, 19.9, -0.1),
        "vp: beta_min must be a finite number of at least 0.0, got -0.1",
    ),
    "vp-no-noise": (
        schedules.vp,
        (5, 0, 0),
        "vp: levels must be finite and decrease strictly in float64, got [0.0, 0.0] at index 1",
    ),
    "vp-overflow": (
        schedules.vp,
        (1, 1e4),
        "vp: levels must be finite and decrease strictly in float64, got [inf] at index 0",
    ),
    "flow-steps": (schedules.flow, (0,), "flow: steps must be at least 1, got 0"),
    "flow-shift": (schedules.flow, (5, 0.0), "flow: shift must be above 0, got 0.0"),
    "flow-times-coincide": (
        schedules.flow,
        (5, 1e30),
        "flow: levels must be finite and decrease strictly in float64, got [1.0, 1.0] at index 1",
    ),
    "betas-name": (
        schedules.betas,
        ("scaled-linear", 10),
        "betas: name must be one of cosine, linear, scaled_linear, got 'scaled-linear'; "
        "did you mean 'scaled_linear'?",
    ),
    "betas-steps": (schedules.betas, ("cosine", 0), "betas: steps must be at least 1, got 0"),
    "betas-linear-too-short": (
        schedules.betas,
        ("linear", 20),
        "betas: steps must be at least 21 for 'linear', whose last beta is 20/steps, got 20",
    ),
    "alphas_cumprod-beta-1": (
        schedules.alphas_cumprod,
        (fractions(0.5, 1.0),),
        "alphas_cumprod: betas must lie strictly between 0 and 1, got 1.0 at index 1",
    ),
    "alphas_cumprod-nan": (
        schedules.alphas_cumprod,
        (fractions(math.nan),),
        "alphas_cumprod: betas must lie strictly between 0 and 1, got nan at index 0",
    ),
    "alphas_cumprod-shape": (
        schedules.alphas_cumprod,
        (fractions([0.5]),),
        "alphas_cumprod: betas must have shape [steps] with at least one step, got [1, 1]",
    ),
    "alphas_cumprod-empty": (
        schedules.alphas_cumprod,
        (fractions(),),
        "alphas_cumprod: betas must have shape [steps] with at least one step, got [0]",
    ),
    "alphas_cumprod-integers": (
        schedules.alphas_cumprod,
        (torch.tensor([1, 2]),),
        "alphas_cumprod: betas must have a floating-point dtype, got torch.int64",
    ),
    "respace-steps": (schedules.respace, (0, "1"), "respace: steps must be at least 1, got 0"),
    "respace-section-too-small": (
        schedules.respace,
        (10, "5,6"),
        "respace: counts[1] must be at most 5, the size of its section, got 6",
    ),
    "respace-more-sections-than-steps": (
        schedules.respace,
        (1, [1, 1]),
        "respace: counts[1] must be at most 0, the size of its section, got 1",
    ),
    "respace-negative": (
        schedules.respace,
        (10, [5, -1]),
        "respace: counts[1] must be at least 0, got -1",
    ),
    "respace-no-stride": (
        schedules.respace,
        (1000, "ddim300"),
        "respace: counts must be 'ddimN' where an integer stride below 1000 keeps exactly N "
        "timesteps, got 'ddim300'; stride 4 keeps 250",
    ),
    "respace-ddim-0": (
        schedules.respace,
        (1000, "ddim0"),
        "respace: counts must be 'ddimN' with N at least 1, got 'ddim0'",
    ),
    "respace-ddim-nothing": (schedules.respace, (1000, "ddim"), "got 'ddim'"),
    "respace-words": (
        schedules.respace,
        (1000, "ten"),
        "respace: counts must be 'ddimN' or section counts such as '10,15,20', got 'ten'",
    ),
    "respace-trailing-comma": (schedules.respace, (1000, "10,"), "respace: counts must be"),
    "respace-nothing": (
        schedules.respace,
        (1000, []),
        "respace: counts must keep at least one timestep, got []",
    ),
    "respace-zeros": (
        schedules.respace,
        (1000, "0,0"),
        "respace: counts must keep at least one timestep, got [0, 0]",
    ),
    "discrete-zero-terminal-snr": (
        schedules.discrete,
        (fractions(0.5, 0.0),),
        "discrete: alphas_cumprod must lie strictly between 0 and 1, got 0.0 at index 1",
    ),
    "discrete-increasing": (
        schedules.discrete,
        (fractions(0.2, 0.5),),
        "discrete: levels must be finite and decrease strictly in float64, got [1.0, 2.0] at "
        "index 1; alphas_cumprod must decrease strictly",
    ),
    "discrete-overflow": (
        schedules.discrete,
        (fractions(1e-320), None, "sigma_min"),
        "discrete: levels must be finite and decrease strictly in float64, got [inf] at index 0",
    ),
    "discrete-timestep-too-large": (
        schedules.discrete,
        (fractions(0.5, 0.2), [0, 2]),
        "discrete: timesteps[1] must be below 2, the length of alphas_cumprod, got 2",
    ),
    "discrete-timestep-negative": (
        schedules.discrete,
        (fractions(0.5, 0.2), [-1]),
        "discrete: timesteps[0] must be at least 0, got -1",
    ),
    "discrete-timestep-twice": (
        schedules.discrete,
        (fractions(0.5, 0.2), [1, 1]),
        "alphas_cumprod must decrease strictly and timesteps be distinct",
    ),
    "discrete-no-timesteps": (
        schedules.discrete,
        (fractions(0.5, 0.2), []),
        "discrete: timesteps must hold at least one timestep, got []",
    ),
    "discrete-final": (
        schedules.discrete,
        (fractions(0.5), None, "none"),
        "discrete: final must be one of sigma_min, zero, got 'none'",
    ),
}

TYPE_ERRORS = {
    "karras-steps-float": (schedules.karras, (5.0,), "karras: steps must be an int, got float"),
    "karras-steps-bool": (schedules.karras, (True,), "karras: steps must be an int, got bool"),
    "karras-rho-str": (
        schedules.karras,
        (5, 0.1, 1.0, "7"),
        "karras: rho must be a real number, got str",
    ),
    "karras-final-none": (
        schedules.karras,
        (5, 0.1, 1.0, 7.0, None),
        "karras: final must be one of sigma_min, zero, got NoneType",
    ),
    "flow-shift-tensor": (
        schedules.flow,
        (5, torch.tensor(3.0)),
        "flow: shift must be a real number, got Tensor",
    ),
    "betas-name-none": (
        schedules.betas,
        (None, 10),
        "betas: name must be one of cosine, linear, scaled_linear, got NoneType",
    ),
    "alphas_cumprod-list": (
        schedules.alphas_cumprod,
        ([0.5],),
        "alphas_cumprod: betas must be a torch.Tensor, got list",
    ),
    "respace-counts-int": (
        schedules.respace,
        (1000, 25),
        "respace: counts must be a string or a list of ints, got int",
    ),
    "respace-counts-floats": (
        schedules.respace,
        (1000, [25.0]),
        "respace: counts[0] must be an int, got float",
    ),
    "discrete-timesteps-tensor": (
        schedules.discrete,
        (fractions(0.5, 0.2), torch.tensor([0])),
        "discrete: timesteps must be a list of ints or None, got Tensor",
    ),
    "discrete-timesteps-floats": (
        schedules.discrete,
        (fractions(0.5, 0.2), [0.0]),
        "discrete: timesteps[0] must be an int, got float",
    ),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_a_bad_value_is_refused_with_its_name_and_what_came(case):
    function, args, message = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*args)


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_a_bad_type_is_refused_with_its_name_and_what_came(case):
    function, args, message = TYPE_ERRORS[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        function(*args)


def test_the_public_names_are_chosen_and_their_examples_run():
    # fmt: off
    assert schedules.__all__ == ["alphas_cumprod", "betas", "discrete", "exponential", "flow",
                                 "karras", "polyexponential", "respace", "restart", "vp"]
    # fmt: on
    assert all(">>>" in getattr(schedules, name).__doc__ for name in schedules.__all__)
    assert doctest.testmod(schedules).failed == 0
