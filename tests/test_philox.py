# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 and what is drawn from it, against published vectors and a scalar oracle.

The oracle is Python integers and float64 ``math``, one element at a time; it shares no code with
the package and is itself held to the known answers.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradsampler.noise import philox
from support.philox import (
    DTYPES,
    ONES,
    TOLERANCE,
    box_muller,
    correlation,
    philox_block,
    scalar_normals,
    scalar_offset,
    scalar_sign,
)

CPU = torch.device("cpu")
BIG_SEED = 2**40 + 7

# (relative, absolute) error against the float64 oracle. In float32 the angle alone is off by half
# an ulp of 2 pi, 4e-7, times a radius of at most 6.8; 16-bit results add half an ulp of their own.


@functools.cache
def normals_f64(count, step, seed):
    return philox.normals(count, step, seed, torch.float64, CPU).numpy()


KNOWN_ANSWERS = [
    pytest.param(
        (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"
    ),
    pytest.param(
        (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"
    ),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]


def tensor_block(counter, seed):
    words = philox.philox4x32(tuple(torch.tensor(c, dtype=torch.int64) for c in counter), seed)
    return [w.tolist() for w in words]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tensor_block(counter, key[0] + (key[1] << 32)) == list(expected)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_oracle_gives_the_published_answers(counter, key, expected):
    assert philox_block(counter, key[0] + (key[1] << 32)) == list(expected)


WORD = st.integers(0, ONES) | st.sampled_from([0, 1, 2**31 - 1, 2**31, ONES - 1, ONES])


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    counters=st.lists(st.tuples(WORD, WORD, WORD, WORD), min_size=1, max_size=6),
    seed=st.integers(0, 2**64 - 1) | st.builds(lambda a, b: a + (b << 32), WORD, WORD),
)
def test_philox_matches_integer_arithmetic(counters, seed):
    got = list(zip(*tensor_block(tuple(zip(*counters, strict=True)), seed), strict=True))
    assert [list(words) for words in got] == [philox_block(c, seed) for c in counters]


def test_philox_keeps_the_shape_of_its_counter():
    counter = torch.arange(24).reshape(2, 3, 4)
    words = philox.philox4x32((counter, counter + 1, counter + 2, counter + 3), 5)
    assert [w.shape for w in words] == [counter.shape] * 4
    assert [int(w[1, 2, 3]) for w in words] == philox_block((23, 24, 25, 26), 5)


STREAMS = [
    pytest.param(0, 0, id="origin"),
    pytest.param(1, 1, id="step1-seed1"),
    pytest.param(35, BIG_SEED, id="seed_above_32_bits"),
    pytest.param(999, 2**64 - 1, id="largest_seed"),
    pytest.param(2**31 + 5, 2**32, id="step_above_31_bits"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("step", "seed"), STREAMS)
def test_normals_match_the_scalar_oracle(step, seed, dtype):
    rtol, atol = TOLERANCE[dtype]
    got = philox.normals(66, step, seed, dtype, CPU)
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double(), scalar_normals(66, step, seed), rtol, atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 10, 63, 257, 1000])
def test_normals_do_not_depend_on_their_count(count, dtype):
    few = philox.normals(count, 3, BIG_SEED, dtype, CPU)
    many = philox.normals(1003, 3, BIG_SEED, dtype, CPU)
    assert few.shape == (count,)
    assert torch.equal(few, many[:count])


# The ends of the range, the last words below 1.0 in float32, and ties of its rounding.
EXTREME_WORDS = [
    *(0, 1, 2, 2**24 - 1, 2**24, 2**24 + 1, 2**25 + 1, 2**25 + 3, 2**30, 2**31 - 1, 2**31),
    *(2**31 + 127, 2**31 + 128, 2**31 + 129, 2**31 + 384, 3 * 2**30),
    *(ONES - 384, ONES - 128, ONES - 127, ONES - 1, ONES),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_normals_of_extreme_words_are_finite_and_right(dtype, monkeypatch):
    pairs = list(itertools.product(EXTREME_WORDS, repeat=2))
    blocks = [first + second for first, second in zip(pairs, reversed(pairs), strict=True)]
    table = torch.tensor(blocks)

    def chosen_words(counter, seed):
        return tuple(table[counter[0]].unbind(-1))

    monkeypatch.setattr(philox, "philox4x32", chosen_words)
    got = philox.normals(4 * len(blocks), 0, 0, dtype, CPU)
    assert torch.isfinite(got).all()
    rtol, atol = TOLERANCE[dtype]
    expected = np.concatenate([box_muller(words) for words in blocks])
    np.testing.assert_allclose(got.double(), expected, rtol, atol)
    # The largest radius is that of the word 0, u = 2^-33.
    assert float(got.double().abs().max()) == pytest.approx(math.sqrt(66 * math.log(2)), rel=4e-3)


COUNT = 2**17


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("step", "seed"), STREAMS)
def test_normals_are_standard_normal(step, seed, dtype):
    x = philox.normals(COUNT, step, seed, dtype, CPU).double().numpy()
    assert np.isfinite(x).all()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    # Five standard errors of each moment's estimate.
    assert abs(x.mean()) < 5 / math.sqrt(COUNT)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / COUNT)
    assert abs(stats.skew(x)) < 5 * math.sqrt(6 / COUNT)
    assert abs(stats.kurtosis(x)) < 5 * math.sqrt(24 / COUNT)


@pytest.mark.parametrize(
    ("step", "seed"),
    [
        pytest.param(1, 0, id="next_step"),
        pytest.param(2**31, 0, id="far_step"),
        pytest.param(0, 1, id="next_seed"),
        pytest.param(0, 2**32, id="other_high_word_of_the_seed"),
        pytest.param(1, 2**32 + 1, id="both"),
    ],
)
def test_normals_of_two_streams_are_uncorrelated(step, seed):
    x, y = normals_f64(COUNT, 0, 0), normals_f64(COUNT, step, seed)
    assert abs(correlation(x, y)) < 5 / math.sqrt(COUNT)
    assert abs(correlation(x**2, y**2)) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64, 128])
def test_neighbouring_normals_are_uncorrelated(lag):
    x = normals_f64(COUNT, 7, BIG_SEED)
    assert abs(correlation(x[lag:], x[:-lag])) < 5 / math.sqrt(COUNT - lag)
    # The two of a Box-Muller pair share a radius: their squares must be independent as well.
    assert abs(correlation(x[lag:] ** 2, x[:-lag] ** 2)) < 5 / math.sqrt(COUNT - lag)


@pytest.mark.parametrize("place", range(4))
def test_normals_of_each_place_in_a_block_are_standard(place):
    assert stats.kstest(normals_f64(COUNT, 2, 3)[place::4], "norm").pvalue > 1e-3


@pytest.mark.parametrize(("step", "seed"), STREAMS)
@pytest.mark.parametrize("size", [1, 31, 32, 33, 127, 128, 129, 300])
def test_signs_take_the_documented_bits(size, step, seed):
    got = philox.signs(3, size, step, seed, CPU)
    assert got.dtype == torch.int8
    expected = [[scalar_sign(j, b, step, seed) for j in range(size)] for b in range(3)]
    assert got.tolist() == expected


def test_signs_are_balanced_and_independent():
    batch, size = 8, 2**14
    x = philox.signs(batch, size, 4, BIG_SEED, CPU).double().numpy()
    bound = 5 / math.sqrt(size)
    assert set(np.unique(x)) == {-1.0, 1.0}
    assert abs(x.mean()) < 5 / math.sqrt(x.size)
    assert np.abs(x.mean(axis=1)).max() < bound
    assert np.abs(np.corrcoef(x) - np.eye(batch)).max() < bound
    for lag in (1, 31, 32, 33, 64, 96, 127, 128):
        assert abs(correlation(x[:, lag:], x[:, :-lag])) < bound
    for step, seed in ((5, BIG_SEED), (4, BIG_SEED + 1), (4, 7)):
        other = philox.signs(batch, size, step, seed, CPU).double().numpy()
        assert abs(correlation(x, other)) < 5 / math.sqrt(x.size)


def test_each_bit_of_a_block_is_balanced():
    blocks = 2**12
    bits = philox.signs(1, 128 * blocks, 0, 0, CPU).double().reshape(blocks, 128)
    assert float(bits.mean(0).abs().max()) < 5 / math.sqrt(blocks)


@pytest.mark.parametrize(("step", "seed"), STREAMS)
def test_offset_matches_the_oracle_and_never_stands_still(step, seed):
    sizes = [*range(2, 51), 4096, 2**20 + 7, 2**33 + 1]
    got = [philox.offset(size, step, seed) for size in sizes]
    assert got == [scalar_offset(size, step, seed) for size in sizes]
    assert all(1 <= o < size for o, size in zip(got, sizes, strict=True))


def test_offsets_are_uniform_over_the_steps():
    size, steps = 12, 2200
    counts = np.bincount([philox.offset(size, k, 9) for k in range(steps)], minlength=size)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:]).pvalue > 1e-3


def test_drawing_leaves_torchs_own_generator_alone():
    before = torch.get_rng_state()
    first = philox.normals(9, 1, 2, torch.float32, CPU)
    philox.signs(2, 9, 1, 2, CPU)
    philox.offset(9, 1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(philox.normals(9, 1, 2, torch.float32, CPU), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_draws_the_same_numbers(dtype):
    device, (rtol, atol) = torch.device("cuda"), TOLERANCE[dtype]
    got = philox.normals(1003, 35, BIG_SEED, dtype, device)
    assert got.device.type == "cuda"
    assert got.dtype == dtype
    np.testing.assert_allclose(got.double().cpu(), scalar_normals(1003, 35, BIG_SEED), rtol, atol)
    signs = philox.signs(3, 300, 35, BIG_SEED, device)
    assert signs.tolist() == [
        [scalar_sign(j, b, 35, BIG_SEED) for j in range(300)] for b in range(3)
    ]
