# SPDX-License-Identifier: Apache-2.0
"""Every step noise against its formula, written out in numpy.

The transposes are held to autograd and to finite differences of that noise.
"""

import inspect
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradsampler import contract, noise
from gradsampler.noise import sources
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import Given, Mixture, NoiseSource, Off, Philox, SignedRoll, SinCos
from support.philox import (
    DTYPES,
    TOLERANCE,
    correlation,
    scalar_normals,
    scalar_offset,
    scalar_sign,
)

N = 12  # steps of the runs below, unless a test says otherwise
BIG_SEED = 2**40 + 3


def once(*steps):
    """The noises of a run that draws once in each of these steps."""
    return [(step, 0) for step in steps]


ONCE = once(*range(N))


def normal(shape, seed=0, dtype=torch.float64):
    draw = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(np.asarray(draw)).to(dtype)


def tensors_like(z0, count=N):
    return [normal(z0.shape, seed=100 + k, dtype=z0.dtype).to(z0.device) for k in range(count)]


# The formulas of the sources, on float64 arrays. They read nothing of the source itself.


def off_formula(z0, i, n):
    return np.zeros(z0.shape)


def sincos_formula(g=0.1, r=0.1, a=0.1, b=0.05):
    return lambda z0, i, n: (
        z0 * (1 + g * i / n) + a * np.sin(z0 * r * i + i) + b * np.cos(z0 * r * i)
    )


def signed_roll_formula(seed=0):
    def formula(z0, i, n):
        rows = z0.reshape(len(z0), -1)
        size = rows.shape[1]
        o = scalar_offset(size, i, seed)
        out = [
            [scalar_sign(j, k, i, seed) * row[(j - o) % size] for j in range(size)]
            for k, row in enumerate(rows)
        ]
        return np.array(out).reshape(z0.shape)

    return formula


def philox_formula(seed=0):
    return lambda z0, i, n: scalar_normals(z0.size, i, seed).reshape(z0.shape)


def mixture_formula(other, angle, seed=0):
    independent = philox_formula(seed)
    return lambda z0, i, n: (
        math.cos(angle) * independent(z0, i, n) + math.sin(angle) * other(z0, i, n)
    )


def given_formula(z0, i, n):
    return np.random.default_rng(100 + i).standard_normal(z0.shape)


class Case(NamedTuple):
    source: object  # (z0) -> NoiseSource
    formula: object  # (z0 array, step, num_steps) -> array
    gradient: bool = True  # does it reach z0?


CASES = {
    "off": Case(lambda z0: Off(), off_formula, gradient=False),
    "sincos": Case(lambda z0: SinCos(), sincos_formula()),
    "sincos_strong": Case(
        lambda z0: SinCos(-0.7, 0.9, -1.3, 0.6), sincos_formula(-0.7, 0.9, -1.3, 0.6)
    ),
    "signed_roll": Case(lambda z0: SignedRoll(), signed_roll_formula()),
    "signed_roll_big_seed": Case(lambda z0: SignedRoll(BIG_SEED), signed_roll_formula(BIG_SEED)),
    "philox": Case(lambda z0: Philox(), philox_formula(), gradient=False),
    "philox_big_seed": Case(
        lambda z0: Philox(2**64 - 1), philox_formula(2**64 - 1), gradient=False
    ),
    "given": Case(lambda z0: Given(tensors_like(z0)), given_formula, gradient=False),
    "mixture_off": Case(
        lambda z0: Mixture(Off(), 0.6, 3), mixture_formula(off_formula, 0.6, 3), gradient=False
    ),
    "mixture_sincos": Case(
        lambda z0: Mixture(SinCos(), 0.6, 3), mixture_formula(sincos_formula(), 0.6, 3)
    ),
    "mixture_signed_roll": Case(
        lambda z0: Mixture(SignedRoll(7), -2.1, BIG_SEED),
        mixture_formula(signed_roll_formula(7), -2.1, BIG_SEED),
    ),
    "mixture_given": Case(
        lambda z0: Mixture(Given(tensors_like(z0)), 1.1, 2),
        mixture_formula(given_formula, 1.1, 2),
        gradient=False,
    ),
}
CASES["replayed"] = Case(
    lambda z0: Replayed(lambda z0, i, number: tensors_like(z0)[i]), given_formula, gradient=False
)
EVERY = pytest.mark.parametrize("case", [pytest.param(c, id=k) for k, c in CASES.items()])
WITH_GRADIENT = pytest.mark.parametrize(
    "case", [pytest.param(c, id=k) for k, c in CASES.items() if c.gradient]
)
WITHOUT_GRADIENT = pytest.mark.parametrize(
    "case", [pytest.param(c, id=k) for k, c in CASES.items() if not c.gradient]
)
STEPS = pytest.mark.parametrize("step", [0, 1, 5, N - 1])

SHAPES = {"2d": (3, 7), "3d": (3, 2, 5), "4d": (2, 3, 4, 5), "5d": (2, 3, 2, 2, 3)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def transposed(shape, seed=0):
    return normal((*shape[:-2], shape[-1], shape[-2]), seed).transpose(-1, -2)


def strided(shape, seed=0):
    return normal(tuple(2 * s for s in shape), seed)[tuple(slice(1, None, 2) for _ in shape)]


def batch_last(shape, seed=0):
    return normal((*shape[1:], shape[0]), seed).movedim(-1, 0)


def expanded(shape, seed=0):
    return normal((1, *shape[1:]), seed).expand(shape)


LAYOUTS = {
    "contiguous": normal,
    "transposed": transposed,
    "strided": strided,
    "batch_last": batch_last,
    "expanded": expanded,
}
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@EVERY
@EVERY_SHAPE
@EVERY_LAYOUT
def test_at_is_the_formula(case, shape, layout):
    z0 = layout(shape)
    assert z0.shape == shape
    for step in (0, 5, N - 1):
        got = case.source(z0).at(z0, step, N)
        assert got.shape == shape
        assert got.dtype == torch.float64
        expected = case.formula(z0.numpy(), step, N)
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-13)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_at_and_transpose_keep_dtype_and_device(case, dtype, device):
    z0 = normal((2, 3, 4), dtype=dtype).to(device)
    source = case.source(z0)
    results = [source.at(z0, 5, N)]
    pulled = source.transpose(torch.ones_like(z0), z0, 5, N)
    results += [x for x in (pulled.z0, *pulled.tensors.values()) if x is not None]
    for x in results:
        assert (x.dtype, x.device, x.shape) == (z0.dtype, z0.device, z0.shape)


@EVERY
def test_at_is_a_pure_function(case):
    z0 = normal((2, 3, 4))
    source, kept, state = case.source(z0), z0.clone(), torch.get_rng_state()
    first = source.at(z0, 5, N)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(source.at(z0, 5, N), first)
    assert torch.equal(z0, kept)


@pytest.mark.parametrize("case", [pytest.param(c, id=k) for k, c in CASES.items()])
@STEPS
def test_draw_holds_the_numbers_of_the_noise(case, step):
    z0 = normal((2, 3, 5))
    source = case.source(z0).prepare(z0, ONCE)
    draw = sources.draw_of(source, z0, step, N, 0, z0.dtype)
    assert draw.step == step
    expected = case.formula(z0.numpy(), step, N)
    np.testing.assert_allclose(evaluate(draw, z0.numpy()), expected, rtol=1e-13, atol=1e-13)


def evaluate(draw, z0):
    """``normal * N(normal_seed, step) + weight * f(z0)`` as ``Draw`` documents it, in numpy."""
    plain = [x for name, x in draw._asdict().items() if name != "given"]
    assert all(type(x) in (int, float) for x in plain)
    assert (draw.given is not None) == (draw.kind == contract.GIVEN)
    if draw.kind == contract.OFF:
        f = np.zeros(z0.shape)
    elif draw.kind == contract.SINCOS:
        f = draw.gain * z0 + draw.amplitude * np.sin(draw.rate * z0 + draw.phase)
    elif draw.kind == contract.SIGNED_ROLL:
        rows = z0.reshape(len(z0), -1)
        f = np.empty_like(rows)
        for (k, j), _ in np.ndenumerate(rows):
            sign = scalar_sign(j, k, draw.step, draw.seed)
            f[k, j] = sign * rows[k, (j - draw.offset) % rows.shape[1]]
        f = f.reshape(z0.shape)
    else:
        assert draw.kind == contract.GIVEN
        f = draw.given.numpy()
    independent = scalar_normals(z0.size, draw.step, draw.normal_seed).reshape(z0.shape)
    return draw.normal * independent + draw.weight * f


@WITH_GRADIENT
@EVERY_SHAPE
@EVERY_LAYOUT
def test_transpose_is_the_gradient_of_at(case, shape, layout):
    z0, g = layout(shape), layout(shape, seed=1)
    source, kept = case.source(z0), (z0.clone(), g.clone())
    for step in (0, 5, N - 1):
        leaf = z0.detach().requires_grad_()
        (expected,) = torch.autograd.grad(source.at(leaf, step, N), leaf, g)
        pulled = source.transpose(g, z0, step, N)
        assert pulled.tensors == {}
        assert pulled.z0.shape == shape
        torch.testing.assert_close(pulled.z0, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(z0, kept[0])
    assert torch.equal(g, kept[1])


@EVERY
@STEPS
def test_transpose_is_the_transposed_jacobian_by_finite_differences(case, step):
    z0, g, h = normal((2, 2, 3)), normal((2, 2, 3), seed=1), 1e-5
    source = case.source(z0)
    expected = torch.zeros(z0.numel(), dtype=torch.float64)
    for k in range(z0.numel()):
        moved = torch.zeros(z0.numel(), dtype=torch.float64)
        moved[k] = h
        up = source.at(z0 + moved.view_as(z0), step, N)
        down = source.at(z0 - moved.view_as(z0), step, N)
        expected[k] = ((up - down) * g).sum() / (2 * h)
    got = source.transpose(g, z0, step, N).z0
    got = torch.zeros_like(z0) if got is None else got
    # Truncation is h^2/6 of the third derivative, at most 9.9^3 * 1.44; rounding 1e-16 / h.
    torch.testing.assert_close(got.flatten(), expected, rtol=0, atol=1e-7)


@WITHOUT_GRADIENT
@STEPS
def test_transpose_sends_nothing_to_z0_where_the_noise_ignores_it(case, step):
    z0 = normal((2, 3)).requires_grad_()
    source = case.source(z0.detach())
    assert not source.at(z0, step, N).requires_grad
    assert source.transpose(torch.ones(2, 3, dtype=torch.float64), z0, step, N).z0 is None
    other = source.at(normal((2, 3), seed=5), step, N)
    assert torch.equal(source.at(z0, step, N), other)


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "grad"])
def test_transpose_works_in_either_grad_mode(case, mode):
    z0, g = normal((2, 3, 4)), normal((2, 3, 4), seed=1)
    source = case.source(z0)
    with mode():
        pulled = source.transpose(g, z0, 5, N)
    assert (pulled.z0 is None) == (not case.gradient)
    assert pulled.z0 is None or not pulled.z0.requires_grad


# SinCos


def sincos_tolerance(z0, i, eps):
    """Half ulps lost at the defaults: 3 on k z0, 6 on the waves, and those of their arguments."""
    return eps * (3 * 1.1 * np.abs(z0) + 0.15 * (6 + i + 3 * np.abs(z0) * 0.1 * i))


@pytest.mark.parametrize("step", [0, 1, 17, 34, 99])
def test_sincos_in_float32_is_the_formula_to_rounding(step):
    z0 = normal((4, 1000), dtype=torch.float32)
    got = SinCos().at(z0, step, 100).double().numpy()
    exact = sincos_formula()(z0.double().numpy(), step, 100)
    assert (np.abs(got - exact) <= sincos_tolerance(z0.numpy(), step, 2**-24)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("which", ["at", "transpose"])
@pytest.mark.parametrize("step", [34, 999])
def test_sincos_in_16_bits_is_the_formula_to_the_rounding_of_its_result(dtype, which, step):
    z0 = normal((4, 1000), dtype=dtype)
    z, i, n = z0.double().numpy(), step, step + 1
    if which == "at":
        got = SinCos().at(z0, i, n)
        exact = sincos_formula()(z, i, n)
    else:
        got = SinCos().transpose(torch.ones_like(z0), z0, i, n).z0
        p = 0.1 * i
        exact = 1 + 0.1 * i / n + 0.1 * p * np.cos(z * p + i) - 0.05 * p * np.sin(z * p)
    # Half an ulp of the result; the float32 before it is off by at most 1e-3 at step 999.
    bound = torch.finfo(dtype).eps / 2 * np.abs(exact) + 1e-3
    assert (np.abs(got.double().numpy() - exact) <= bound).all()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(SinCos(), id="defaults"),
        pytest.param(SinCos(-0.7, 0.9, -1.3, 0.6), id="strong"),
        pytest.param(SinCos(0, 1, 1, 0), id="sine_only"),
        pytest.param(SinCos(0, -1, 0, -2), id="cosine_only"),
        pytest.param(SinCos(0.2, 0.1, 0, 0), id="gain_only"),
    ],
)
@pytest.mark.parametrize(("step", "num_steps"), [(0, 1), (1, 35), (34, 35), (500, 1000)])
def test_wave_is_both_waves_as_one(source, step, num_steps):
    g, r, a, b = source.scale_gain, source.phase_rate, source.sin_amp, source.cos_amp
    k, p, amplitude, phi = source.wave(step, num_steps)
    assert k == pytest.approx(1 + g * step / num_steps, rel=1e-15)
    assert p == pytest.approx(r * step, rel=1e-15)
    # |a e^(i step) + b i|^2, and its two parts.
    assert amplitude >= 0
    square = a * a + b * b + 2 * a * b * math.sin(step)
    assert amplitude**2 == pytest.approx(square, rel=1e-13, abs=1e-15)
    assert amplitude * math.cos(phi) == pytest.approx(a * math.cos(step), rel=1e-13, abs=1e-15)
    assert amplitude * math.sin(phi) == pytest.approx(a * math.sin(step) + b, rel=1e-13, abs=1e-15)
    z = np.linspace(-6, 6, 1001)
    expected = sincos_formula(g, r, a, b)(z, step, num_steps)
    # Rounding of arguments of up to |p z| + i; below 1e-12 at the defaults.
    atol = 1e-15 * (6 * abs(k) + (abs(a) + abs(b)) * (1 + 6 * abs(p) + step))
    np.testing.assert_allclose(k * z + amplitude * np.sin(p * z + phi), expected, 0, atol)


def test_sincos_by_hand():
    # Step 2 of 4 at z0 = 1 and z0 = 0: 1.05 + 0.1 sin(2.2) + 0.05 cos(0.2) and 0.1 sin(2) + 0.05.
    z0 = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    got = SinCos().at(z0, 2, 4)[0].tolist()
    assert got == pytest.approx([1.1798529692, 0.1409297427], abs=1e-9)


def test_sincos_is_almost_perfectly_correlated_with_z0():
    # The known defect of this noise, which its documentation states: it is not to be mended.
    z0 = normal((1, 2**14))
    for step in range(35):
        assert correlation(SinCos().at(z0, step, 35), z0) > 0.98


# SignedRoll


@settings(derandomize=True, database=None, deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5).filter(
        lambda s: 2 <= math.prod(s[1:]) <= 400
    ),
    step=st.integers(0, 2**20),
    seed=st.integers(0, 2**64 - 1),
)
def test_signed_roll_is_the_formula_for_any_shape_step_and_seed(shape, step, seed):
    z0 = normal(tuple(shape))
    got = SignedRoll(seed).at(z0, step, step + 1)
    assert np.array_equal(got.numpy(), signed_roll_formula(seed)(z0.numpy(), step, 1))


def whole_numbers(shape, seed):
    """Whole numbers whose products sum without rounding in float64."""
    draw = np.random.default_rng(seed).integers(-(2**20), 2**20, shape)
    return torch.from_numpy(draw).double()


@EVERY_SHAPE
@STEPS
def test_signed_roll_transposes_exactly(shape, step):
    source = SignedRoll(BIG_SEED)
    z0, g = whole_numbers(shape, 1), whole_numbers(shape, 2)
    forward, back = source.at(z0, step, N), source.transpose(g, z0, step, N).z0
    for b in range(shape[0]):
        assert float((forward[b] * g[b]).sum()) == float((z0[b] * back[b]).sum())


@EVERY_SHAPE
@STEPS
def test_signed_roll_undoes_itself(shape, step):
    source, z0 = SignedRoll(5), normal(shape)
    assert torch.equal(source.transpose(source.at(z0, step, N), z0, step, N).z0, z0)


@EVERY_SHAPE
@STEPS
def test_signed_roll_keeps_the_magnitudes_of_each_sample(shape, step):
    z0 = normal(shape)
    n = SignedRoll(2).at(z0, step, N)
    rows, rolled = z0.flatten(1).abs(), n.flatten(1).abs()
    assert torch.equal(rows.sort(1).values, rolled.sort(1).values)
    torch.testing.assert_close(rolled.norm(dim=1), rows.norm(dim=1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("size", [2, 3, 12, 33])
def test_signed_roll_is_an_orthogonal_matrix_without_fixed_places(size):
    batch, step, source = 3, 4, SignedRoll(8)
    unit = torch.eye(size, dtype=torch.float64)
    columns = [source.at(unit[k].expand(batch, size), step, N) for k in range(size)]
    matrix = torch.stack(columns, dim=-1)  # [batch, out, in]
    for b in range(batch):
        assert torch.equal(matrix[b].T @ matrix[b], unit)
        assert torch.equal(matrix[b].diagonal(), torch.zeros(size, dtype=torch.float64))


def test_signed_roll_of_a_sample_does_not_depend_on_its_batch():
    z0 = normal((4, 3, 5))
    assert torch.equal(SignedRoll(1).at(z0, 3, N)[:2], SignedRoll(1).at(z0[:2], 3, N))


@pytest.mark.parametrize("dtype", DTYPES)
def test_signed_roll_rounds_nothing(dtype):
    z0 = normal((2, 3, 4), dtype=dtype)
    expected = signed_roll_formula(3)(z0.double().numpy(), 5, N)
    assert np.array_equal(SignedRoll(3).at(z0, 5, N).double().numpy(), expected)


def test_signed_roll_is_uncorrelated_with_z0_and_with_other_steps():
    batch, d, steps = 4, 64 * 64, 6
    z0 = normal((batch, 64, 64))
    drawn = [z0, *(SignedRoll(6).at(z0, i, steps) for i in range(steps))]
    drawn += [SignedRoll(7).at(z0, i, steps) for i in range(2)]
    for b in range(batch):
        matrix = np.corrcoef([n[b].flatten().numpy() for n in drawn])
        assert np.abs(matrix - np.eye(len(drawn))).max() < 5 / math.sqrt(d)
    for n in drawn[1:]:
        flat = n.flatten(1).numpy()
        for lag in (1, 64, 128):
            assert abs(correlation(flat[:, lag:], flat[:, :-lag])) < 5 / math.sqrt(batch * d)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(SignedRoll(1), id="signed_roll"),
        pytest.param(Philox(1), id="philox"),
        pytest.param(Mixture(SignedRoll(1), 0.7, 2), id="mixture"),
        pytest.param(Mixture(SignedRoll(1), 0.7, 1), id="mixture_of_one_seed"),
    ],
)
@pytest.mark.parametrize("step", [0, 7])
def test_noise_is_standard_normal(source, step):
    x = source.at(normal((16, 64, 64)), step, N).flatten().numpy()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(x.mean()) < 5 / math.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / x.size)
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / x.size)


@pytest.mark.parametrize(
    ("source", "spread"),
    [
        # Of K unit-variance steps summed: 2/d from z0's own energy, 2/d (1 - 1/K) from crossings.
        pytest.param(SignedRoll(3), (4 - 2 / 16) / 64, id="signed_roll"),
        pytest.param(Philox(3), 2 / 64, id="philox"),
    ],
)
def test_energy_of_a_sum_of_steps_in_a_tiny_state(source, spread):
    batch, d, steps = 500, 64, 16
    z0 = normal((batch, d))
    x = sum(source.at(z0, i, steps) for i in range(steps)) / math.sqrt(steps)
    energy = (x**2).mean(1)
    assert float(energy.mean()) == pytest.approx(1, abs=5 * math.sqrt(spread / batch))
    assert float(energy.std()) == pytest.approx(math.sqrt(spread), rel=5 / math.sqrt(2 * batch))


# Philox


@pytest.mark.parametrize("dtype", DTYPES)
def test_philox_matches_the_oracle_in_every_dtype(dtype):
    rtol, atol = TOLERANCE[dtype]
    got = Philox(BIG_SEED).at(torch.zeros(2, 3, 5, dtype=dtype), 35, 40)
    expected = scalar_normals(30, 35, BIG_SEED).reshape(2, 3, 5)
    np.testing.assert_allclose(got.double(), expected, rtol, atol)


def test_philox_depends_on_the_element_alone():
    flat = Philox(4).at(torch.zeros(1, 24), 2, N).flatten()
    for shape in ((2, 12), (6, 4), (2, 3, 4), (1, 2, 2, 5)):
        got = Philox(4).at(torch.ones(shape), 2, N).flatten()
        assert torch.equal(got, flat[: got.numel()])
    assert torch.equal(Philox(4).at(torch.zeros(1, 24), 2, 1000).flatten(), flat)


# Mixture


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(SinCos(), id="sincos"),
        pytest.param(SignedRoll(3), id="signed_roll"),
    ],
)
def test_mixture_turns_from_philox_to_the_other(other):
    z0 = normal((2, 3, 4))
    start, end = Mixture(other, 0.0, 9), Mixture(other, math.pi / 2, 9)
    assert torch.equal(start.at(z0, 5, N), Philox(9).at(z0, 5, N))
    torch.testing.assert_close(end.at(z0, 5, N), other.at(z0, 5, N), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("angle", [0.0, 0.6, math.pi / 2, -2.1])
def test_mixture_scales_the_gradient_of_the_other(angle):
    z0, g = normal((2, 3, 4)), normal((2, 3, 4), seed=1)
    got = Mixture(SinCos(), angle, 9).transpose(g, z0, 5, N).z0
    p = 0.1 * 5
    z = z0.numpy()
    slope = 1 + 0.1 * 5 / N + 0.1 * p * np.cos(p * z + 5) - 0.05 * p * np.sin(p * z)
    np.testing.assert_allclose(got, math.sin(angle) * slope * g.numpy(), rtol=1e-13, atol=1e-15)


def test_mixture_passes_on_the_tensors_of_the_other_and_their_gradient():
    z0, g = normal((2, 3)), normal((2, 3), seed=1)
    tensors = tensors_like(z0, 3)
    mixture = Mixture(Given(tensors), 0.4)
    assert all(x is y for x, y in zip(mixture.tensors, tensors, strict=True))
    assert Mixture(SinCos(), 0.4).tensors == ()
    prepared = mixture.prepare(z0, once(2, 5, 6))
    pulled = prepared.transpose(g, z0, 5, N)
    assert pulled.z0 is None
    assert list(pulled.tensors) == [1]
    np.testing.assert_allclose(pulled.tensors[1], math.sin(0.4) * g.numpy(), rtol=1e-15)


# Given


def test_given_returns_its_tensors_in_order():
    z0 = normal((2, 3))
    tensors = tensors_like(z0, 4)
    for kind in (list, tuple):
        source = Given(kind(tensors))
        assert all(x is y for x, y in zip(source.tensors, tensors, strict=True))
        for k, x in enumerate(tensors):
            assert torch.equal(source.at(z0, k, 4), x)


def test_given_follows_the_run_it_is_prepared_for():
    z0 = normal((2, 3))
    tensors = tensors_like(z0, 3)
    source = Given(tensors)
    prepared = source.prepare(z0, once(0, 4, 7))
    for step, x in zip((0, 4, 7), tensors, strict=True):
        assert torch.equal(prepared.at(z0, step, 10), x)
        assert torch.equal(prepared.draw(z0, step, 10).given, x)
        assert prepared.draw(z0, step, 10).step == step
    assert torch.equal(source.at(z0, 1, 10), tensors[1])  # the original is as it was
    with pytest.raises(ValueError, match=r"Given: step must be one of \[0, 4, 7\], got 5"):
        prepared.at(z0, 5, 10)


@pytest.mark.parametrize("step", [-1, 3, 100])
def test_given_refuses_a_step_without_a_tensor(step):
    z0 = normal((2, 3))
    with pytest.raises(ValueError, match=rf"Given: step must be one of \[0, 1, 2\], got {step}"):
        Given(tensors_like(z0, 3)).at(z0, step, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", [0, 4, 7])
def test_gradient_reaches_the_given_tensor_of_the_step_alone(dtype, step):
    z0, g = normal((2, 3)), normal((2, 3), seed=1)
    tensors = [x.to(dtype).requires_grad_() for x in tensors_like(z0, 3)]
    source = Given(tensors).prepare(z0, once(0, 4, 7))
    out = source.at(z0, step, 10)
    assert out.dtype == z0.dtype
    expected = torch.autograd.grad(out, tensors, g, allow_unused=True)
    pulled = source.transpose(g, z0, step, 10)
    assert pulled.z0 is None
    position = (0, 4, 7).index(step)
    assert list(pulled.tensors) == [position]
    for k, gradient in enumerate(expected):
        assert (gradient is None) == (k != position)
    assert pulled.tensors[position].dtype == dtype
    assert torch.equal(pulled.tensors[position], expected[position])


@pytest.mark.parametrize(
    ("tensors", "fragments"),
    [
        pytest.param(
            lambda z0: tensors_like(z0, 2),
            ["noise=Given: tensors", "one tensor for each of the 3 injections", "got 2"],
            id="too_few",
        ),
        pytest.param(
            lambda z0: tensors_like(z0, 4),
            ["noise=Given: tensors", "one tensor for each of the 3 injections", "got 4"],
            id="too_many",
        ),
        pytest.param(
            lambda z0: [*tensors_like(z0, 2), normal((3, 2))],
            ["noise=Given: tensors[2]", "shape [2, 3]", "got [3, 2]"],
            id="shape",
        ),
        pytest.param(
            lambda z0: [normal((1, 3)), *tensors_like(z0, 2)],
            ["noise=Given: tensors[0]", "shape [2, 3]", "got [1, 3]"],
            id="shape_that_would_broadcast",
        ),
        pytest.param(
            lambda z0: [z0, torch.empty(2, 3, device="meta"), z0],
            ["noise=Given: tensors[1]", "be on cpu", "got meta"],
            id="device",
        ),
    ],
)
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Mixture(s, 0.3)], ids=["bare", "mixture"])
def test_prepare_refuses_given_tensors_that_do_not_fit(tensors, fragments, wrap):
    z0 = normal((2, 3))
    with pytest.raises(ValueError, match="noise=Given") as caught:
        wrap(Given(tensors(z0))).prepare(z0, once(0, 4, 7))
    assert all(fragment in str(caught.value) for fragment in fragments)


# prepare, and bad input


@EVERY
def test_prepare_changes_no_number(case):
    z0 = normal((2, 3, 4))
    source = case.source(z0)
    prepared = source.prepare(z0, ONCE)
    assert type(prepared) is type(source)
    for step in (0, 5, N - 1):
        assert torch.equal(prepared.at(z0, step, N), source.at(z0, step, N))


@pytest.mark.parametrize("shape", [(3, 1), (3, 1, 1), (1, 1)], ids=str)
@pytest.mark.parametrize(
    "source",
    [SignedRoll(), Mixture(SignedRoll(), 0.3)],
    ids=["signed_roll", "mixture"],
)
def test_prepare_refuses_to_roll_a_single_element(source, shape):
    with pytest.raises(ValueError, match=r"SignedRoll: z0 must hold at least 2 .* got 1$"):
        source.prepare(normal(shape), ONCE)


@pytest.mark.parametrize(
    "source", [Off(), SinCos(), Philox(), Mixture(SinCos(), 0.3)], ids=lambda s: type(s).__name__
)
def test_other_sources_take_a_single_element(source):
    z0 = normal((3, 1))
    assert source.prepare(z0, ONCE).at(z0, 0, N).shape == (3, 1)


def test_prepare_takes_two_elements_to_roll():
    z0 = normal((3, 2))
    source = SignedRoll()
    assert source.prepare(z0, ONCE) == source
    assert torch.equal(source.at(z0, 0, N).abs(), z0.flip(1).abs())


SEEDED = [
    pytest.param("SignedRoll", SignedRoll, id="signed_roll"),
    pytest.param("Philox", Philox, id="philox"),
    pytest.param("Mixture", lambda seed: Mixture(Off(), 0.3, seed), id="mixture"),
]


@pytest.mark.parametrize(("owner", "make"), SEEDED)
@pytest.mark.parametrize(
    ("seed", "error", "expected", "got"),
    [
        pytest.param(-1, ValueError, "be at least 0", "got -1", id="negative"),
        pytest.param(2**64, ValueError, "be below 2**64", f"got {2**64}", id="above_64_bits"),
        pytest.param(True, TypeError, "be an int", "got bool", id="bool"),
        pytest.param(1.0, TypeError, "be an int", "got float", id="float"),
        pytest.param("1", TypeError, "be an int", "got str", id="str"),
        pytest.param(None, TypeError, "be an int", "got NoneType", id="none"),
    ],
)
def test_bad_seeds_are_refused(owner, make, seed, error, expected, got):
    with pytest.raises(error) as caught:
        make(seed)
    assert str(caught.value) == f"{owner}: seed must {expected}, {got}"


@pytest.mark.parametrize(("owner", "make"), SEEDED)
@pytest.mark.parametrize("seed", [0, 2**32, 2**64 - 1])
def test_seeds_of_64_bits_are_taken(owner, make, seed):
    assert make(seed).seed == seed


@pytest.mark.parametrize(
    ("value", "error", "expected", "got"),
    [
        pytest.param(math.nan, ValueError, "be a finite number", "got nan", id="nan"),
        pytest.param(math.inf, ValueError, "be a finite number", "got inf", id="inf"),
        pytest.param(-math.inf, ValueError, "be a finite number", "got -inf", id="minus_inf"),
        pytest.param("0.1", TypeError, "be a real number", "got str", id="str"),
        pytest.param(1j, TypeError, "be a real number", "got complex", id="complex"),
        pytest.param(True, TypeError, "be a real number", "got bool", id="bool"),
    ],
)
@pytest.mark.parametrize(
    ("argument", "make"),
    [
        pytest.param("SinCos: scale_gain", lambda x: SinCos(scale_gain=x), id="scale_gain"),
        pytest.param("SinCos: phase_rate", lambda x: SinCos(phase_rate=x), id="phase_rate"),
        pytest.param("SinCos: sin_amp", lambda x: SinCos(sin_amp=x), id="sin_amp"),
        pytest.param("SinCos: cos_amp", lambda x: SinCos(cos_amp=x), id="cos_amp"),
        pytest.param("Mixture: angle", lambda x: Mixture(Off(), x), id="angle"),
    ],
)
def test_bad_numbers_are_refused(argument, make, value, error, expected, got):
    with pytest.raises(error) as caught:
        make(value)
    assert str(caught.value) == f"{argument} must {expected}, {got}"


@pytest.mark.parametrize(
    ("make", "error", "fragments"),
    [
        pytest.param(
            lambda: Mixture("philox", 0.3),
            TypeError,
            ["Mixture: other", "gradsampler.noise object", "got str"],
            id="mixture_of_a_name",
        ),
        pytest.param(
            lambda: Mixture(SignedRoll, 0.3),
            TypeError,
            ["Mixture: other", "gradsampler.noise object", "got "],
            id="mixture_of_a_class",
        ),
        pytest.param(
            lambda: Mixture(Philox(1), 0.3),
            ValueError,
            ["Mixture: other", "not be independent noise itself", "got Philox(seed=1"],
            id="mixture_of_two_normals",
        ),
        pytest.param(
            lambda: Mixture(Mixture(SignedRoll(), 0.3), 0.3),
            ValueError,
            ["Mixture: other", "not be independent noise itself", "got Mixture("],
            id="mixture_of_a_mixture",
        ),
        pytest.param(
            lambda: Given(torch.zeros(4, 2, 3)),
            TypeError,
            ["Given: tensors", "list of tensors", "got Tensor"],
            id="given_one_tensor",
        ),
        pytest.param(
            lambda: Given(x for x in [torch.zeros(2, 3)]),
            TypeError,
            ["Given: tensors", "list of tensors", "got generator"],
            id="given_a_generator",
        ),
        pytest.param(
            lambda: Given([torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)]),
            ValueError,
            ["Given: tensors[1]", "floating-point", "got torch.int64"],
            id="given_int_tensors",
        ),
        pytest.param(
            lambda: Given([torch.zeros(2, 3, dtype=torch.complex64)]),
            ValueError,
            ["Given: tensors[0]", "floating-point", "got torch.complex64"],
            id="given_complex_tensors",
        ),
        pytest.param(
            lambda: Given([torch.zeros(2, 3), np.zeros((2, 3))]),
            TypeError,
            ["Given: tensors[1]", "torch.Tensor", "got ndarray"],
            id="given_arrays",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, fragments):
    with pytest.raises(error) as caught:
        make()
    assert all(fragment in str(caught.value) for fragment in fragments)


# Sources of one's own


class Cubed(NoiseSource):
    """Mixes the elements of a sample, so that its Jacobian is neither diagonal nor symmetric."""

    def at(self, z0, step, num_steps):
        return z0**3 * (step + 1) / num_steps + z0.roll(1, dims=-1) ** 2


class Constant(NoiseSource):
    def at(self, z0, step, num_steps):
        return torch.full_like(z0, step)


class Learned(NoiseSource):
    """Depends on a parameter of its own, not on z0."""

    def __init__(self, parameter):
        self.parameter = parameter

    def at(self, z0, step, num_steps):
        return self.parameter * torch.ones_like(z0)


def cubed_transpose(z0, g, step):
    return 3 * z0**2 * (step + 1) / N * g + 2 * z0 * np.roll(g, -1, axis=-1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "grad"])
@EVERY_LAYOUT
def test_a_source_of_ones_own_is_transposed_by_default(mode, layout):
    z0, g = layout((2, 3, 4)), layout((2, 3, 4), seed=1)
    expected = cubed_transpose(z0.numpy(), g.numpy(), 5)
    with mode():
        pulled = Cubed().transpose(g, z0, 5, N)
        mixed = Mixture(Cubed(), 0.4).transpose(g, z0, 5, N)
    assert pulled.tensors == {}
    assert not pulled.z0.requires_grad
    np.testing.assert_allclose(pulled.z0, expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(mixed.z0, math.sin(0.4) * expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires_grad"])
def test_default_transpose_leaves_the_callers_tensors_alone(requires_grad):
    z0, g = normal((2, 3)).requires_grad_(requires_grad), normal((2, 3), seed=1)
    Cubed().transpose(g, z0, 5, N)
    assert z0.requires_grad == requires_grad
    assert z0.grad is None
    assert not g.requires_grad


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(Constant(), id="constant"),
        pytest.param(
            Learned(torch.ones((), dtype=torch.float64, requires_grad=True)), id="learned"
        ),
    ],
)
def test_default_transpose_of_a_noise_without_z0_sends_it_nothing(source):
    pulled = source.transpose(normal((2, 3)), normal((2, 3)), 5, N)
    assert pulled.z0 is None
    assert pulled.tensors == {}


def test_a_source_of_ones_own_has_the_plain_defaults():
    source, z0 = Cubed(), normal((2, 3))
    assert source.tensors == ()
    assert source.prepare(z0, ONCE) is source
    assert source.draw(z0, 0, N) is None
    assert Mixture(source, 0.3).draw(z0, 0, N) is None


def test_a_source_must_define_at():
    class Nothing(NoiseSource):
        pass

    with pytest.raises(TypeError, match=r"abstract method '?at"):
        Nothing()


def test_the_sources_are_values():
    # Equal sources plan the same run; none can change under a run that holds it.
    assert SinCos() == SinCos(0.1, 0.1, 0.1, 0.05)
    assert SignedRoll(3) == SignedRoll(3) != SignedRoll(4)
    assert Mixture(SignedRoll(3), 0.2) == Mixture(SignedRoll(3), 0.2)
    assert len({Off(), Off(), Philox(), Philox(0), SignedRoll()}) == 3
    with pytest.raises(AttributeError):
        Philox().seed = 3


def test_public_names_are_pinned():
    assert sorted(noise.__all__) == [
        "Given", "Mixture", "NoiseSource", "Off", "Philox", "Replayed", "SignedRoll",
        "SinCos", "names", "register", "resolve", "typical",
    ]  # fmt: skip


# The registry


def test_the_registry_has_every_source():
    typical = noise.typical(normal((3, 7)), 2)
    classes = {value for value in vars(noise).values() if inspect.isclass(value)} - {NoiseSource}
    assert {type(source) for source in typical.values()} == classes
    needing = {Mixture, Given, Replayed}  # arguments
    assert {type(noise.resolve(name)) for name in noise.names()} == classes - needing


@pytest.mark.parametrize("name", noise.names())
def test_a_typical_source_has_no_parameter_at_its_default(name):
    typical, default = noise.typical(normal((3, 7)), 2)[name], noise.resolve(name)
    for field, value in vars(default).items():
        switch = isinstance(value, bool)  # which makes it another source, with tests of its own
        assert switch or getattr(typical, field) != value


def test_a_source_of_ones_own_is_registered_once(monkeypatch):
    monkeypatch.setattr(noise.named, "_REGISTRY", dict(noise.named._REGISTRY))

    @dataclass(frozen=True)
    class Scaled(NoiseSource):
        factor: float

        def at(self, z0, step, num_steps):
            return self.factor * z0

    with pytest.raises(ValueError, match=r"typical must be given, as Scaled needs arguments"):
        noise.register("scaled", Scaled)
    noise.register("scaled", Scaled, lambda z0, n: Scaled(0.5))
    assert noise.typical(normal((3, 7)), 2)["scaled"] == Scaled(0.5)
    assert "scaled" not in noise.names()
    with pytest.raises(ValueError, match=r"name must be new, got 'scaled'"):
        noise.register("scaled", Scaled, lambda z0, n: Scaled(0.5))
    with pytest.raises(ValueError, match=r"noise must be one of off, .*, got 'scaled'"):
        noise.resolve("scaled")
