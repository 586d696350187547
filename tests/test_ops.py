# SPDX-License-Identifier: Apache-2.0
"""`gs.ops.step` against its formula, written out."""

import math

import pytest
import torch
from torch.autograd import gradcheck

import gradsampler as gs
from support.problems import normal
from support.runs import leaf, levels

# Relative to the largest sum of magnitudes: rounding of a few operations and of the result.
TOLERANCE = {
    torch.float64: 1e-15,
    torch.float32: 4e-7,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}
CENTRAL = {"eps": 1e-5, "atol": 1e-8, "rtol": 1e-7}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
counts = pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12, 14])
shapes = pytest.mark.parametrize(
    "shape", [(1, 1), (2, 3), (3, 255), (2, 257), (1, 3, 5, 7), (4, 1, 2)], ids=str
)
COEFFICIENTS = (0.7, -1.3, 0.05, 2.0, 1.0, -0.4, 1e-3, 30.0, -0.6, 5.0, 0.2, -7.0, 0.9, -2.5)


class Line(gs.noise.NoiseSource):
    """A noise that can be written down in a line."""

    def at(self, z0, step, num_steps):
        return 2 * z0 + step / num_steps


def line(z0, step, num_steps):
    return 2 * z0.double() + step / num_steps


def sincos(z0, i, n, g=0.1, r=0.1, a=0.1, b=0.05):
    z0 = z0.double()
    return z0 * (1 + g * i / n) + a * torch.sin(z0 * r * i + i) + b * torch.cos(z0 * r * i)


def formula(terms, coefs, noise=None, noise_coef=0.0):
    """The sum in float64, element by element, and the sum of magnitudes."""
    total, size = 0.0, 0.0
    for c, x in zip(coefs, terms, strict=True):
        column = torch.as_tensor(c, dtype=torch.float64)
        column = column.view(-1, *[1] * (x.ndim - 1)) if column.ndim else column
        total = total + column * x.double()
        size = size + (column * x.double()).abs()
    if noise is not None:
        total = total + noise_coef * noise
        size = size + (noise_coef * noise).abs()
    return total, size


def assert_matches(got, expected, dtype):
    total, size = expected
    assert got.dtype == dtype
    assert got.shape == total.shape
    assert ((got.double() - total).abs() <= TOLERANCE[dtype] * size.abs() + 1e-30).all()


def terms_of(count, shape, dtype=torch.float64):
    return [normal(*shape, seed=k, dtype=dtype) for k in range(count)]


@dtypes
@counts
@shapes
def test_floats(shape, count, dtype):
    terms, coefs = terms_of(count, shape, dtype), COEFFICIENTS[:count]
    assert_matches(gs.ops.step(terms, list(coefs)), formula(terms, coefs), dtype)


@dtypes
@shapes
def test_noise(shape, dtype):
    terms, coefs, z0 = terms_of(2, shape, dtype), [0.3, -0.8], normal(*shape, seed=9, dtype=dtype)
    for source, noise in [(Line(), line), (gs.noise.SinCos(), sincos)]:
        got = gs.ops.step(terms, coefs, z0, source, 3, 7, 1.7)
        assert_matches(got, formula(terms, coefs, noise(z0, 3, 7), 1.7), dtype)


@dtypes
@shapes
def test_coefficients_in_a_tensor(shape, dtype):
    terms = terms_of(3, shape, dtype)
    shared = torch.tensor(COEFFICIENTS[:3], dtype=dtype)
    assert_matches(gs.ops.step(terms, shared), formula(terms, shared), dtype)
    own = normal(shape[0], 3, seed=7, dtype=dtype)
    assert_matches(gs.ops.step(terms, own), formula(terms, own.T), dtype)


def test_as_many_samples_as_terms():
    # [B, K] with B = K: rows are samples.
    terms, coefs = terms_of(2, (2, 3)), levels([[1.0, 2.0], [30.0, 40.0]])
    got = gs.ops.step(terms, coefs)
    torch.testing.assert_close(got[0], 1 * terms[0][0] + 2 * terms[1][0])
    torch.testing.assert_close(got[1], 30 * terms[0][1] + 40 * terms[1][1])


def test_worked_example():
    x, denoised = torch.full((1, 2), 4.0), torch.zeros(1, 2)
    z0 = torch.tensor([[1.0, -1.0]])
    got = gs.ops.step([x, denoised], [0.5, 0.5], z0, Line(), 1, 4, 2.0)
    assert got.tolist() == [[0.5 * 4 + 2 * (2 + 0.25), 0.5 * 4 + 2 * (-2 + 0.25)]]


@pytest.mark.parametrize("amount", [0.5, torch.tensor(0.5), levels(0.5)], ids=repr)
def test_amount_of_noise_in_every_form(amount):
    terms, z0 = terms_of(1, (2, 3)), normal(2, 3, seed=5)
    got = gs.ops.step(terms, [1.0], z0, Line(), 0, 1, amount)
    torch.testing.assert_close(got, terms[0] + z0, rtol=1e-15, atol=1e-15)


MIXED = {
    "bf16-and-float32": ((torch.bfloat16, torch.float32), torch.bfloat16, torch.float32),
    "float32-and-float64": ((torch.float32, torch.float64), torch.float32, torch.float64),
    "three": ((torch.float16, torch.bfloat16, torch.float64), torch.float16, torch.float32),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name):
    dtypes, first, z0_dtype = MIXED[name]
    terms = [normal(2, 3, seed=k, dtype=dtype) for k, dtype in enumerate(dtypes)]
    coefs, z0 = COEFFICIENTS[: len(terms)], normal(2, 3, seed=9, dtype=z0_dtype)
    expected = formula(terms, coefs, line(z0, 1, 2), 0.9)
    assert_matches(gs.ops.step(terms, coefs, z0, Line(), 1, 2, 0.9), expected, first)
    for dtype in TOLERANCE:
        got = gs.ops.step(terms, coefs, z0, Line(), 1, 2, 0.9, out_dtype=dtype)
        tolerant = torch.float32 if dtype == torch.float64 and name == "bf16-and-float32" else dtype
        assert_matches(got.to(tolerant), expected, tolerant)
        assert got.dtype == dtype


def test_half_terms_are_summed_in_float32():
    # 2048 + 1 is no float16; the sum of the three is.
    terms = [torch.full((1, 2), v, dtype=torch.float16) for v in (2048.0, 1.0, 1.0)]
    assert gs.ops.step(terms, [1.0, 1.0, 1.0]).tolist() == [[2050.0, 2050.0]]


STRIDED = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda x: torch.stack([x, x + 1], dim=-1).flatten(1)[:, ::2].view_as(x),
    "expanded": lambda x: x[:1].expand_as(x),
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_terms(layout):
    shape = (2, 3, 4, 5)
    terms = [STRIDED[layout](normal(*shape, seed=k)).requires_grad_() for k in range(2)]
    terms.append(normal(*shape, seed=2).requires_grad_())
    z0 = STRIDED[layout](normal(*shape, seed=3)).requires_grad_()
    coefs = (0.2, -1.1, 0.6)
    got = gs.ops.step(terms, coefs, z0, Line(), 1, 2, 0.5)
    assert_matches(got, formula(terms, coefs, line(z0, 1, 2), 0.5), torch.float64)
    weights = normal(*shape, seed=4)
    found = torch.autograd.grad((got * weights).sum(), [*terms, z0])
    for g, c in zip(found, (*coefs, 2 * 0.5), strict=True):
        torch.testing.assert_close(g, c * weights)


# Gradients.


def check(function, *inputs):
    assert gradcheck(function, inputs, **CENTRAL)


@pytest.mark.parametrize("form", ["floats", "[K]", "[B, K]"])
def test_every_gradient(form):
    terms, z0 = [leaf(x) for x in terms_of(3, (2, 3))], leaf(normal(2, 3, seed=5))
    amount = leaf(levels(0.7))
    coefs = {
        "floats": list(COEFFICIENTS[:3]),
        "[K]": leaf(levels(COEFFICIENTS[:3])),
        "[B, K]": leaf(normal(2, 3, seed=6)),
    }[form]
    learned = [coefs] if isinstance(coefs, torch.Tensor) else []
    for noise in (gs.noise.SinCos(), gs.noise.SignedRoll(3), gs.noise.Philox(3), Line()):
        check(
            lambda *_, noise=noise: gs.ops.step(terms, coefs, z0, noise, 2, 5, amount),
            *terms,
            z0,
            amount,
            *learned,
        )


def test_gradients_literally():
    terms, z0, g = terms_of(2, (2, 3)), normal(2, 3, seed=5), normal(2, 3, seed=6)
    inputs = [leaf(x) for x in (*terms, z0, levels([0.3, 0.9]), levels(0.4))]
    x, y, z0, coefs, amount = inputs
    out = gs.ops.step([x, y], coefs, z0, Line(), 1, 4, amount)
    dx, dy, dz0, dcoefs, damount = torch.autograd.grad(out, inputs, g)
    torch.testing.assert_close(dx, 0.3 * g)
    torch.testing.assert_close(dy, 0.9 * g)
    torch.testing.assert_close(dz0, 0.4 * 2 * g)
    torch.testing.assert_close(dcoefs, torch.stack([(x * g).sum(), (y * g).sum()]))
    torch.testing.assert_close(damount, ((2 * z0 + 0.25) * g).sum())


def test_the_same_tensor_in_every_role():
    x = leaf(normal(2, 3))
    check(lambda x: gs.ops.step([x, x, x], [0.1, 0.2, 0.3], x, gs.noise.SinCos(), 2, 4, 0.5), x)


@pytest.mark.parametrize("wanted", range(5), ids=["x", "y", "z0", "coefs", "amount"])
def test_subsets_of_requires_grad(wanted):
    inputs = [*terms_of(2, (2, 3)), normal(2, 3, seed=5), levels([0.3, 0.9]), levels(0.4)]
    inputs[wanted] = leaf(inputs[wanted])
    x, y, z0, coefs, amount = inputs
    check(
        lambda *_: gs.ops.step([x, y], coefs, z0, gs.noise.SinCos(), 2, 4, amount), inputs[wanted]
    )


def test_second_derivative():
    inputs = [
        leaf(normal(1, 2)),
        leaf(normal(1, 2, seed=1)),
        leaf(levels([0.4])),
        leaf(levels(2.0)),
    ]

    def function(x, z0, coefs, amount):
        return gs.ops.step([x], coefs, z0, gs.noise.SinCos(phase_rate=0.7), 2, 3, amount)

    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-5, atol=1e-7, rtol=1e-6)


def test_gradients_have_the_dtype_of_their_tensor():
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float64)
    shapes = ((2, 3), (2, 3), (2, 3), (2,), ())
    inputs = [leaf(normal(*s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
    x, y, z0, coefs, amount = inputs
    out = gs.ops.step([x, y], coefs, z0, Line(), 0, 1, amount)
    for tensor, g in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert g.dtype == tensor.dtype
        assert g.shape == tensor.shape


def test_constants_record_no_graph():
    assert not gs.ops.step(terms_of(2, (2, 3)), [0.1, 0.2]).requires_grad
    with torch.no_grad():
        assert not gs.ops.step([leaf(normal(2, 3))], [0.1]).requires_grad


def test_terms_stay_as_they_are():
    terms, z0 = terms_of(2, (2, 3)), normal(2, 3, seed=5)
    tensors = [*terms, z0]
    before = [x.clone() for x in tensors]
    gs.ops.step(terms, [0.1, 0.2], z0, gs.noise.SinCos(), 1, 2, 1.0).mul_(0)
    gs.ops.step(terms, [1.0, 0.0]).mul_(0)
    gs.ops.step(terms[:1], [1.0]).mul_(0)
    assert all(map(torch.equal, tensors, before))


# Given noise.


def test_given_noise_by_its_position():
    tensors = [leaf(normal(2, 3, seed=k)) for k in range(3)]
    x, noise = normal(2, 3, seed=9), gs.noise.Given(tensors)
    for step in range(3):
        got = gs.ops.step([x], [1.0], x, noise, step, 3, 0.5)
        torch.testing.assert_close(got, x + 0.5 * tensors[step])
        grads = torch.autograd.grad(got.sum(), tensors, allow_unused=True)
        for k, g in enumerate(grads):
            if k == step:
                torch.testing.assert_close(g, torch.full_like(g, 0.5))
            else:
                assert g is None or not g.any()


def test_given_noise_of_a_single_step():
    x, tensor = normal(2, 3), leaf(normal(2, 3, seed=1))
    check(lambda t: gs.ops.step([x], [1.0], x, gs.noise.Given([t]), 0, 1, 0.3), tensor)


# Where the result goes.


def test_out_is_written_in_place():
    terms, out = terms_of(2, (2, 3)), torch.full((2, 3), math.nan, dtype=torch.float64)
    got = gs.ops.step(terms, [0.4, -2.0], out=out)
    assert got is out
    assert_matches(out, formula(terms, [0.4, -2.0]), torch.float64)


def test_out_may_be_a_term():
    terms = terms_of(2, (2, 3))
    expected = formula([x.clone() for x in terms], [0.4, -2.0])
    assert_matches(gs.ops.step(terms, [0.4, -2.0], out=terms[0]), expected, torch.float64)


def test_out_may_overlap_z0():
    x, z0 = normal(2, 3), normal(2, 3, seed=1)
    expected = x + gs.noise.SignedRoll(4).at(z0, 1, 2)
    torch.testing.assert_close(
        gs.ops.step([x], [1.0], z0, gs.noise.SignedRoll(4), 1, 2, 1.0, out=z0), expected
    )


def test_out_may_be_strided_and_of_another_dtype():
    terms = terms_of(2, (2, 3))
    out = torch.full((3, 4), math.nan, dtype=torch.float32)[:, ::2].T
    gs.ops.step(terms, [0.4, -2.0], out=out)
    assert_matches(out, formula(terms, [0.4, -2.0]), torch.float32)


def test_out_without_grad_mode():
    x, out = leaf(normal(2, 3)), torch.zeros(2, 3, dtype=torch.float64)
    with torch.no_grad():
        gs.ops.step([x], [2.0], out=out)
    assert torch.equal(out, 2 * x.detach())


X = normal(2, 3)
META = torch.zeros(2, 3, dtype=torch.float64, device="meta")
ERRORS = {
    "no-terms": (TypeError, ("terms", "non-empty"), lambda: gs.ops.step([], [])),
    "terms-tensor": (TypeError, ("terms", "list", "Tensor"), lambda: gs.ops.step(X, [1.0])),
    "term-number": (TypeError, ("terms[1]", "float"), lambda: gs.ops.step([X, 1.0], [1, 1])),
    "term-int": (
        ValueError, ("terms[0]", "floating", "int64"), lambda: gs.ops.step([X.long()], [1.0])
    ),
    "term-1d": (ValueError, ("terms[0]", "[3]"), lambda: gs.ops.step([X[0]], [1.0])),
    "term-empty": (ValueError, ("terms[0]", "[0, 3]"), lambda: gs.ops.step([X[:0]], [1.0])),
    "term-shape": (
        ValueError,
        ("terms[1]", "[2, 3]", "[1, 3]"),
        lambda: gs.ops.step([X, X[:1]], [1.0, 1.0]),
    ),
    "term-elsewhere": (
        ValueError, ("terms[1]", "cpu", "meta"), lambda: gs.ops.step([X, META], [1.0, 1.0])
    ),
    "coefs-few": (ValueError, ("coefs", "2", "got 1"), lambda: gs.ops.step([X, X], [1.0])),
    "coefs-many": (ValueError, ("coefs", "1", "got 2"), lambda: gs.ops.step([X], [1.0, 2.0])),
    "coefs-nan": (ValueError, ("coefs[0]", "nan"), lambda: gs.ops.step([X], [math.nan])),
    "coefs-word": (TypeError, ("coefs[0]", "str"), lambda: gs.ops.step([X], ["1"])),
    "coefs-number": (TypeError, ("coefs", "float"), lambda: gs.ops.step([X], 1.0)),
    "coefs-shape": (
        ValueError, ("coefs", "[1]", "[2, 1]", "[3]"), lambda: gs.ops.step([X], normal(3))
    ),
    "coefs-batch": (
        ValueError, ("coefs", "[2, 2]", "[3, 2]"), lambda: gs.ops.step([X, X], normal(3, 2))
    ),
    "coefs-int": (
        ValueError, ("coefs", "floating", "int64"), lambda: gs.ops.step([X], torch.tensor([1]))
    ),
    "z0-missing": (
        ValueError, ("z0", "noise", "None"), lambda: gs.ops.step([X], [1.0], None, Line())
    ),
    "z0-shape": (
        ValueError,
        ("z0", "[2, 3]", "[3, 2]"),
        lambda: gs.ops.step([X], [1.0], normal(3, 2), Line()),
    ),
    "z0-elsewhere": (
        ValueError, ("z0", "cpu", "meta"), lambda: gs.ops.step([X], [1.0], META, Line())
    ),
    "z0-int": (
        ValueError, ("z0", "floating"), lambda: gs.ops.step([X], [1.0], X.long(), Line())
    ),
    "noise-word": (TypeError, ("noise", "str"), lambda: gs.ops.step([X], [1.0], X, "off")),
    "noise-absent": (
        ValueError, ("noise", "None"), lambda: gs.ops.step([X], [1.0], X, noise_coef=1.0)
    ),
    "step-negative": (
        ValueError, ("step: step", "-1"), lambda: gs.ops.step([X], [1.0], X, Line(), -1, 3)
    ),
    "step-large": (
        ValueError, ("step: step", "3"), lambda: gs.ops.step([X], [1.0], X, Line(), 3, 3)
    ),
    "step-float": (
        TypeError, ("step: step", "float"), lambda: gs.ops.step([X], [1.0], X, Line(), 1.0, 3)
    ),
    "num_steps-0": (
        ValueError, ("num_steps", "0"), lambda: gs.ops.step([X], [1.0], X, Line(), 0, 0)
    ),
    "noise_coef-shape": (
        ValueError,
        ("noise_coef", "[4]"),
        lambda: gs.ops.step([X[:1]], [1.0], X[:1], Line(), 0, 1, normal(4)),
    ),
    "noise_coef-nan": (
        ValueError, ("noise_coef", "nan"),
        lambda: gs.ops.step([X], [1.0], X, Line(), 0, 1, math.nan),
    ),
    "noise_coef-word": (
        TypeError, ("noise_coef", "str"), lambda: gs.ops.step([X], [1.0], X, Line(), 0, 1, "1")
    ),
    "roll-of-one-element": (
        ValueError,
        ("SignedRoll", "at least 2", "got 1"),
        lambda: gs.ops.step([X[:, :1]], [1.0], X[:, :1], gs.noise.SignedRoll(), 0, 1, 1.0),
    ),
    "given-shape": (
        ValueError,
        ("Given", "[2, 3]", "[3]"),
        lambda: gs.ops.step([X], [1.0], X, gs.noise.Given([normal(3)]), 0, 1, 1.0),
    ),
    "out-shape": (
        ValueError, ("out", "[2, 3]", "[2, 2]"), lambda: gs.ops.step([X], [1.0], out=normal(2, 2))
    ),
    "out-number": (TypeError, ("out", "float"), lambda: gs.ops.step([X], [1.0], out=1.0)),
    "out-with-a-gradient": (
        ValueError, ("out", "gradient"), lambda: gs.ops.step([leaf(X)], [1.0], out=normal(2, 3))
    ),
    "out-elsewhere": (
        ValueError, ("out", "cpu", "meta"), lambda: gs.ops.step([X], [1.0], out=META.clone())
    ),
    "out_dtype-int": (
        ValueError, ("out_dtype", "int32"), lambda: gs.ops.step([X], [1.0], out_dtype=torch.int32)
    ),
    "out_dtype-word": (
        TypeError, ("out_dtype", "str"), lambda: gs.ops.step([X], [1.0], out_dtype="float32")
    ),
    "backend-misspelt": (
        ValueError,
        ("backend", "'referense'", "'reference'"),
        lambda: gs.ops.step([X], [1.0], backend="referense"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error, words, call = ERRORS[name]
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for word in ("step", "got", *words):
        if word == "step" and {"backend", "Given", "SignedRoll"} & set(words):
            continue
        assert word in message, f"{word!r} is missing in: {message}"


def test_out_of_a_wrong_shape_is_left_alone():
    out = torch.full((2, 2), 7.0, dtype=torch.float64)
    with pytest.raises(ValueError, match="out"):
        gs.ops.step([X], [1.0], out=out)
    assert (out == 7).all()


# ------------------------------------------------------------------ out is written


def places(case, x, z0):
    """An ``out`` that overlaps what is read, or lies in memory of its own kind."""
    if case == "a term":
        return x
    if case == "z0":
        return z0
    if case == "transposed":
        return torch.empty(4, 3, dtype=x.dtype).T
    return z0._base[1:4]  # one row on from z0


@pytest.mark.parametrize("case", ["a term", "z0", "transposed", "shifted"])
@pytest.mark.parametrize("source", [None, gs.noise.SinCos(), gs.noise.SignedRoll(5)], ids=repr)
def test_out_may_overlap_what_is_read(case, source):
    """The expected values are those of copies, by the definition of the noise."""
    x, d = normal(3, 4, seed=1), normal(3, 4, seed=2)
    z0 = normal(5, 4, seed=3)[0:3]
    n = 0.0 if source is None else source.at(z0.clone(), 2, 5)
    expected = 0.5 * x - 1.5 * d + 0.7 * n
    out = places(case, x, z0)
    amount = 0.0 if source is None else 0.7
    given = {} if source is None else {"z0": z0, "noise": source, "step": 2, "num_steps": 5}
    result = gs.ops.step([x, d], [0.5, -1.5], **given, noise_coef=amount, out=out)
    assert result is out
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_out_is_refused_before_anything_is_written():
    x, out = leaf(normal(3, 4)), torch.zeros(3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="step: out must be None where a gradient is recorded"):
        gs.ops.step([x], [2.0], out=out)
    assert not out.any()
